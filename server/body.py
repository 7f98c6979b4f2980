"""Bodies and the few headers that say more about a request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from pacellm.errors import Aborted, BodyTimeout, BodyTooLarge, RequestError
from server.schema.base import RESPONSE_PREFIX, SESSION_ID
from server.service import Service

_SMALL_BODY = 256 * 1024
_USUAL_LIMIT = 64 * 2**20
T = TypeVar("T")


async def parsed(request: Request, parse: Callable[[bytes], T]) -> tuple[bytes, T]:
    """The body as it came and as ``parse`` reads it; large ones are parsed off the event loop.

    Raises:
        RequestError: too large, too slow, or not what ``parse`` wants.
    """
    service: Service = request.app.state.service
    raw = bytes(await timed_body(request, service.settings.max_body_bytes))
    return raw, parse(raw) if len(raw) < _SMALL_BODY else await service.off_loop(parse, raw)


async def timed_body(request: Request, limit: int) -> bytearray:
    """The body, if it comes in time: ``body_seconds``, and as long again for each further 64 MiB that ``limit`` allows.

    Raises:
        BodyTooLarge: it is over ``limit`` bytes. BodyTimeout: it is too slow.
    """
    service: Service = request.app.state.service
    seconds = service.settings.body_seconds * max(1, limit / _USUAL_LIMIT)
    try:
        async with asyncio.timeout(seconds):
            return await read_body(request, limit)
    except TimeoutError:
        raise BodyTimeout(f"the body did not come within {seconds:g} s") from None


async def read_body(request: Request, limit: int) -> bytearray:
    """The body, refused as soon as it is over the limit.

    Raises:
        BodyTooLarge: the declared or the real length is over ``limit`` bytes. Aborted: the client left.
    """
    declared = request.headers.get("content-length", "")
    data = bytearray()
    if not declared.isdigit() or int(declared) <= limit:
        try:
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    break
            else:
                return data
        except ClientDisconnect:
            raise Aborted("the client disconnected before its request was complete") from None
    raise BodyTooLarge(f"the body is over the limit of {limit:,} bytes")


def session_of(request: Request, named: str | None) -> str | None:
    """The session that body or header name.

    Args:
        named: the body's ``session_id``.

    Raises:
        RequestError: they name different ones, the header's is malformed, or it is a stored response's.
    """
    header = request.headers.get("x-session-id")
    if header is not None and not re.match(SESSION_ID, header):
        raise RequestError("X-Session-ID must be 1 to 256 of A-Z a-z 0-9 . _ : -", param="X-Session-ID")
    if header is not None and named is not None and header != named:
        raise RequestError("body and X-Session-ID name different sessions", param="session_id")
    name = named or header
    if name is not None:
        check_writable(name)
    return name


def check_writable(session: str) -> None:
    """Refuse a session that is a stored response's: it stays as it was.

    Raises:
        RequestError: it is.
    """
    if session.startswith(RESPONSE_PREFIX):
        raise RequestError(
            f"a session whose name begins with {RESPONSE_PREFIX} is a stored response's; fork it", param="session_id"
        )
