"""What OpenAI's API and other servers' have and this one not: said by name where it is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT_ALONE = "this server generates text; ask a server that has a model for it"
_STATE = "send POST /v1/responses with previous_response_id or conversation, or a session_id"
_FILES = "send the text in the request itself"
_JOBS = "send the requests to the endpoint itself; what is too much at once waits in its queue"
_V1 = "the base URL ends in /v1"


@dataclass(frozen=True)
class Unserved:
    """An endpoint that is not served.

    Attributes:
        path: a pattern for all of it.
        name: what it is called.
        advice: what to do instead.
        method: of the request, where others of the path are served; empty: any.
    """

    path: str
    name: str
    advice: str
    method: str = ""


UNSERVED = (
    Unserved(r"/v1/embeddings", "embeddings", _TEXT_ALONE),
    Unserved(r"/v1/images(/.*)?", "images", _TEXT_ALONE),
    Unserved(r"/v1/audio(/.*)?", "audio", _TEXT_ALONE),
    Unserved(r"/v1/videos(/.*)?", "videos", _TEXT_ALONE),
    Unserved(r"/v1/realtime(/.*)?", "realtime sessions", "stream POST /v1/chat/completions or /v1/responses"),
    Unserved(r"/v1/moderations", "moderations", _TEXT_ALONE),
    Unserved(r"/(v1/|v2/)?(rerank|score)", "reranking", _TEXT_ALONE),
    Unserved(r"/v1/(files|uploads|vector_stores|containers)(/.*)?", "files and vector stores", _FILES),
    Unserved(r"/v1/(fine_tuning|fine-tunes)(/.*)?", "fine-tuning", "train elsewhere and serve the model by its folder"),
    Unserved(r"/v1/batches(/.*)?", "batches", _JOBS),
    Unserved(r"/v1/(assistants|threads)(/.*)?", "assistants and threads", _STATE),
    Unserved(r"/v1/conversations(/.*)?", "conversations as things of their own",
             "name one in POST /v1/responses, which begins it; /v1/sessions lists and deletes it"),
    Unserved(r"/v1/chat/completions/.+", "stored chat completions", _STATE),
    Unserved(r"/v1/chat/completions", "stored chat completions", _STATE, "GET"),
    Unserved(r"/v1/responses/[^/]+/cancel", "background responses", "end one with POST /v1/requests/{id}/cancel"),
    Unserved(r"/v1/responses/compact", "compaction", "a session keeps its whole history; fork or reset it"),
    Unserved(r"/v1/responses/input_tokens", "counting of input tokens", "send POST /tokenize with messages"),
    Unserved(r"/v1/(evals|skills|chatkit|organization|projects)(/.*)?", "OpenAI's platform", "use OpenAI's own"),
    Unserved(r"/v1/(edits|engines(/.*)?)", "edits and engines, which OpenAI has ended", "send POST /v1/completions"),
    Unserved(r"/v1/messages(/.*)?", "Anthropic's API", "send POST /v1/chat/completions"),
    Unserved(r"/api/(chat|generate|tags|show|embed|embeddings)", "Ollama's API", "set the client to OpenAI's, at /v1"),
    Unserved(r"/((chat/)?completions|responses(/.*)?|models(/.*)?|embeddings)", "OpenAI's API without /v1", _V1),
)  # fmt: skip


def of(method: str, path: str) -> Unserved | None:
    """What a path that no route takes is known for."""
    return next((one for one in UNSERVED if one.method in ("", method) and re.fullmatch(one.path, path)), None)
