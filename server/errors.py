"""Exceptions to answers: always ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from pacellm.errors import (
    Conflict,
    Draining,
    InvalidApiKey,
    Overloaded,
    PaceError,
    RequestError,
    UnsupportedEncoding,
)

from . import unserved

logger = logging.getLogger("pacellm.server")
_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")


def body_of(error: PaceError) -> dict[str, Any]:
    """The error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def response_of(error: PaceError) -> JSONResponse:
    """The answer to a request that failed before its stream began."""
    headers = {}
    if isinstance(error, Overloaded | Draining | Conflict):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, InvalidApiKey):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, UnsupportedEncoding):
        headers["Accept-Encoding"] = "gzip, deflate, identity"
    elif error.status >= 500:
        headers["x-should-retry"] = "false"  # a prompt that made the engine fail once would do it again
    return JSONResponse(body_of(error), status_code=error.status, headers=headers)


def install(app: FastAPI) -> None:
    """Make every failure of the app an OpenAI-shaped one."""

    @app.exception_handler(PaceError)
    async def pace_error(request: Request, error: PaceError) -> JSONResponse:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def parameter_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:]))
        return response_of(RequestError(f"{name}: {first['msg']}", param=name, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code in (404, 405):
            return _no_route(request, error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def any_error(request: Request, error: Exception) -> JSONResponse:
        logger.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return response_of(PaceError("internal error; the server's log has the details"))


def _no_route(request: Request, status: int) -> JSONResponse:
    """The answer where nothing takes a path, or not with this method; what other servers have there is named."""
    method, path = request.method, request.url.path
    known = unserved.of(method, path)
    if known is not None and not known.method:
        status = 404  # whatever a route makes of it
    allowed = _allowed(request) if status == 405 else []
    if known is not None:
        detail, code = f"{known.name}: not served here; {known.advice}", "not_served"
    elif allowed:
        detail, code = f"takes {', '.join(allowed)} only", "method_not_allowed"
    else:
        detail, code = "there is no such endpoint; GET /openapi.json lists all", "not_found"
    error = RequestError(f"{method} {path[:200]}: {detail}", code=code)
    return JSONResponse(body_of(error), status_code=status, headers={"Allow": ", ".join(allowed)} if allowed else None)


def _allowed(request: Request) -> list[str]:
    """All methods that a path takes: each of them may have a route of its own."""
    taken = [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]
    return sorted([*taken, "HEAD"]) if "GET" in taken else taken
