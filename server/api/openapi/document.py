"""Routes, body schemas and the table of operations put together to one document."""

from __future__ import annotations

import sys
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ...idempotency import KEY
from ...schema import SESSION_ID, Strict
from .answers import SCHEMAS, ref
from .operations import JSON, OPERATIONS, Operation
from .rules import WRITABLE, Limits, narrow

_ERRORS = {
    400: "A bad value; `param` names the field",
    401: "No key, or a wrong one",
    403: "A browser sent it for another origin's page, or the key is not for this",
    404: "Not there, or another caller's",
    408: "The body did not come in time",
    409: "An equal request, or the session, is in use",
    413: "The body is over the limit",
    415: "The body's Content-Encoding is not supported",
    429: "The queue is full, or the key's limit is reached",
    499: "The request was cancelled",
    500: "The request failed inside the server",
    503: "The server is shutting down, or the engine has stopped",
    504: "The request's deadline passed",
}
_SESSION_HEADERS = {
    "X-PaceLLM-Session": "What became of the session; `queued` in a stream that waited for more than a second",
    "X-PaceLLM-Dropped-Tokens": "Tokens of the session's history that the prompt does not begin with",
}
# name, what it is about, beginnings of paths; the last one takes what is left
_TAGS = (
    (
        "Answers",
        "Chat, text completions and responses, streamed or not",
        ("/v1/chat", "/v1/completions", "/v1/responses"),
    ),
    ("Sessions", "Histories and banks that are kept between requests", ("/v1/sessions",)),
    ("Requests", "What runs and waits", ("/v1/requests",)),
    ("Tokens", "Text to ids and back", ("/tokenize", "/detokenize")),
    ("Server", "The model, the config, health and metrics", ("/",)),
)
_KEY = {"bearer": {"type": "http", "scheme": "bearer", "description": "Where the server was started with keys"}}


def document(app: FastAPI) -> dict[str, Any]:
    """The document of an app's routes.

    Raises:
        KeyError: a route that the table of operations does not know.
    """
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies: dict[str, Any] = {}
    for path, methods in made["paths"].items():
        for method, described in methods.items():
            _complete(described, OPERATIONS[method.upper(), path], bodies)
            described["tags"] = [_tag(path)]
    narrow(bodies, Limits.of(app.state.service))
    made["tags"] = [{"name": name, "description": about} for name, about, _ in _TAGS]
    schemas = {**SCHEMAS, "Document": {"type": "object"}, **bodies}
    answers = {f"Error{status}": _error(status) for status in _ERRORS}
    made["components"] = {"schemas": schemas, "responses": answers, "securitySchemes": _KEY}
    return made


def _tag(path: str) -> str:
    return next(name for name, _, beginnings in _TAGS if path.startswith(beginnings))


def _complete(described: dict[str, Any], operation: Operation, bodies: dict[str, Any]) -> None:
    """Give an operation its headers, its body, its answers and its key.

    Args:
        bodies: gets the schemas of its body.
    """
    for parameter in described.get("parameters", ()):
        if parameter["name"] == "name":
            parameter["schema"] = {"type": "string", "pattern": WRITABLE if operation.writes else SESSION_ID}
    if operation.streams:
        described.setdefault("parameters", []).append(_header("Idempotency-Key", KEY))
    if operation.has_session:
        described["parameters"].append(_header("X-Session-ID", WRITABLE))
    described["responses"] = _answers(operation, described["description"].splitlines()[0])
    described["security"] = [] if operation.is_public else [{"bearer": []}]
    if operation.body is not None:
        described["requestBody"] = _body(operation, bodies)


def _answers(operation: Operation, description: str) -> dict[str, Any]:
    """By status."""
    whole: dict[str, Any] = {"description": description, "content": {operation.answer: {}}}
    if "/" not in operation.answer:
        whole["content"] = {JSON: {"schema": ref(operation.answer)}}
    if operation.streams:
        whole["content"]["text/event-stream"] = {}
        whole["headers"] = {name: _told(text) for name, text in _SESSION_HEADERS.items()}
    errors = (400, 500, *operation.errors, *(() if operation.is_public else (401, 403)))
    answers: dict[int, Any] = {status: {"$ref": f"#/components/responses/Error{status}"} for status in errors}
    answers |= dict.fromkeys((operation.status, *operation.also), whole)
    return {str(status): answers[status] for status in sorted(answers)}


def _told(text: str) -> dict[str, Any]:
    return {"description": text, "required": False, "schema": {"type": "string"}}


def _header(name: str, pattern: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string", "pattern": pattern}}


def _body(operation: Operation, bodies: dict[str, Any]) -> dict[str, Any]:
    if isinstance(operation.body, str):
        content: dict[str, Any] = {operation.body: {"schema": {"type": "string", "format": "binary"}}}
    else:
        assert operation.body is not None
        content = {JSON: {"schema": _request(operation.body, bodies), "example": operation.example}}
    return {"required": not operation.may_lack_body, "content": content}


def _request(kind: type[Strict], bodies: dict[str, Any]) -> dict[str, Any]:
    """A body's schema; fields that have to be as usual list what that is."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    bodies |= schema.pop("$defs", {})
    neutral = getattr(sys.modules[kind.__module__], "NEUTRAL", {})
    for name, usual in neutral.items():
        schema["properties"][name] = {"enum": [None, *usual]}
    bodies[kind.__name__] = schema
    return ref(kind.__name__)


def _error(status: int) -> dict[str, Any]:
    return {"description": _ERRORS[status], "content": {JSON: {"schema": ref("Error")}}}
