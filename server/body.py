"""Bodies and the few headers that say more about a request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from pacellm.errors import BodyTimeout, BodyTooLarge, RequestError
from server.schema.base import SESSION_ID
from server.service import Service

_SMALL_BODY = 256 * 1024
T = TypeVar("T")


async def parsed(request: Request, parse: Callable[[bytes], T]) -> tuple[bytes, T]:
    """The body as it came and as ``parse`` reads it; large ones are parsed off the event loop.

    Raises:
        RequestError: too large, too slow, or not what ``parse`` wants.
    """
    service: Service = request.app.state.service
    try:
        async with asyncio.timeout(service.settings.body_seconds):
            raw = await read_body(request, service.settings.max_body_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the body did not come within {service.settings.body_seconds:g} s") from None
    return raw, parse(raw) if len(raw) < _SMALL_BODY else await service.off_loop(parse, raw)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is over the limit.

    Raises:
        BodyTooLarge: the declared or the real length is over ``limit`` bytes.
    """
    declared = request.headers.get("content-length", "")
    parts, size = [], int(declared) if declared.isdigit() else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
    if size > limit:
        raise BodyTooLarge(f"the body is over the limit of {limit:,} bytes")
    return b"".join(parts)


def session_of(request: Request, named: str | None) -> str | None:
    """The session that body or header name.

    Args:
        named: the body's ``session_id``.

    Raises:
        RequestError: they name different ones, or the header's is malformed.
    """
    header = request.headers.get("x-session-id")
    if header is not None and not re.match(SESSION_ID, header):
        raise RequestError("X-Session-ID must be 1 to 256 of A-Z a-z 0-9 . _ : -", param="X-Session-ID")
    if header is not None and named is not None and header != named:
        raise RequestError("body and X-Session-ID name different sessions", param="session_id")
    return named or header
