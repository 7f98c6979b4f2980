"""What each endpoint takes and answers, beside what its route says itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...schema import Strict
from ..chat.schema import ChatCompletionRequest
from ..completions.schema import CompletionRequest
from ..responses.schema import ResponseRequest
from ..sessions.schema import NamedSession
from ..tokens.schema import DetokenizeRequest, TokenizeRequest

JSON = "application/json"
TENSORS = "application/vnd.safetensors"
PLAIN = "text/plain"
_BODY = (408, 413, 415, 429)
_ENGINE = (503,)
_GENERATION = (404, 409, *_BODY, 499, 503, 504)
_HI = [{"role": "user", "content": "What is the access code of the amber archive?"}]


@dataclass(frozen=True)
class Operation:
    """One endpoint.

    Attributes:
        answer: name of the schema of its answer, or the media type where it is not JSON.
        body: what checks its body, or the media type where that is not JSON.
        example: a body.
        errors: statuses that it answers with beside 400, 401, 403 and 500.
        status: of success.
        may_lack_body: an empty body is as good as ``{}``.
        streams: with ``stream: true`` it answers with server-sent events.
        has_session: a header may name its session.
        is_public: it needs no key.
        also: further statuses that carry its usual answer.
        writes: the session in its path is changed.
    """

    answer: str
    body: type[Strict] | str | None = None
    example: Any = None
    errors: tuple[int, ...] = ()
    status: int = 200
    may_lack_body: bool = False
    streams: bool = False
    has_session: bool = False
    is_public: bool = False
    also: tuple[int, ...] = ()
    writes: bool = False


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "ChatCompletion",
        ChatCompletionRequest,
        {"messages": _HI, "max_tokens": 16, "session_id": "readme"},
        _GENERATION,
        streams=True,
        has_session=True,
    ),
    ("POST", "/v1/completions"): Operation(
        "Completion",
        CompletionRequest,
        {"prompt": "The river", "max_tokens": 8},
        _GENERATION,
        streams=True,
        has_session=True,
    ),
    ("POST", "/v1/responses"): Operation(
        "Response",
        ResponseRequest,
        {"input": _HI[0]["content"], "max_output_tokens": 16},
        _GENERATION,
        streams=True,
    ),
    ("GET", "/v1/responses/{response_id}"): Operation("Response", errors=(404,)),
    ("DELETE", "/v1/responses/{response_id}"): Operation("ResponseDeleted", errors=(404,)),
    ("GET", "/v1/responses/{response_id}/input_items"): Operation("ResponseItems", errors=(404,)),
    ("POST", "/tokenize"): Operation("Tokens", TokenizeRequest, {"prompt": "The river"}, (404, *_BODY)),
    ("POST", "/detokenize"): Operation("Text", DetokenizeRequest, {"tokens": [65, 66]}, (404, *_BODY)),
    ("GET", "/v1/models"): Operation("Models"),
    ("GET", "/v1/models/{model}"): Operation("Model", errors=(404,)),
    ("GET", "/v1/config"): Operation("Config"),
    ("GET", "/v1/requests"): Operation("Requests"),
    ("POST", "/v1/requests/{request_id}/cancel"): Operation("Cancelled", errors=(404,)),
    ("GET", "/v1/sessions"): Operation("Sessions", errors=(404, *_ENGINE)),
    ("POST", "/v1/sessions"): Operation(
        "Session",
        NamedSession,
        {"session_id": "readme", "ttl": 3600},
        (409, *_BODY, *_ENGINE),
        status=201,
        may_lack_body=True,
    ),
    ("DELETE", "/v1/sessions"): Operation("SessionsDeleted", errors=_ENGINE, also=(202,)),
    ("GET", "/v1/sessions/{name}"): Operation("Session", errors=(404, *_ENGINE)),
    ("GET", "/v1/sessions/{name}/banks/{layer}"): Operation("Bank", errors=(404, 409, *_ENGINE)),
    ("DELETE", "/v1/sessions/{name}"): Operation("SessionDeleted", errors=(404, *_ENGINE), also=(202,)),
    ("POST", "/v1/sessions/{name}/reset"): Operation("Session", errors=(404, 409, *_ENGINE), also=(202,), writes=True),
    ("POST", "/v1/sessions/{name}/fork"): Operation(
        "Session",
        NamedSession,
        {"session_id": "second"},
        (404, 409, *_BODY, *_ENGINE),
        status=201,
        may_lack_body=True,
    ),
    ("GET", "/v1/sessions/{name}/snapshot"): Operation(TENSORS, errors=(404, *_ENGINE)),
    ("PUT", "/v1/sessions/{name}/snapshot"): Operation(
        "Session", TENSORS, errors=(409, *_BODY, *_ENGINE), also=(202,), writes=True
    ),
    ("GET", "/version"): Operation("Version"),
    ("GET", "/metrics"): Operation(PLAIN),
    ("GET", "/openapi.json"): Operation("Document"),
    ("GET", "/health"): Operation("Health", is_public=True, also=(503,)),
    ("GET", "/ready"): Operation("Ready", is_public=True, also=(503,)),
}
