"""Exceptions to answers: always ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pacellm.errors import Conflict, Draining, InvalidApiKey, Overloaded, PaceError, RequestError

logger = logging.getLogger("pacellm.server")


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
        name = str(first["loc"][-1])
        return response_of(RequestError(f"{name}: {first['msg']}", param=name, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def any_error(request: Request, error: Exception) -> JSONResponse:
        logger.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return response_of(PaceError("internal error; the server's log has the details"))
