"""Bodies and the few headers that say more about a request."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from pacellm.errors import Aborted, BodyTimeout, BodyTooLarge, RequestError

from .auth import tenant_of
from .body_budget import Claim
from .json_shape import shape_of
from .schema import RESPONSE_PREFIX, SESSION_ID
from .service import Service

_SMALL_BODY = 16 * 1024
_USUAL_LIMIT = 64 * 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Received:
    """What is kept of a body as it came.

    Attributes:
        size: in bytes.
        digest: empty where nothing asks for one.
    """

    size: int
    digest: bytes


async def parsed(request: Request, parse: Callable[[bytes | bytearray], T]) -> tuple[Received, T]:
    """The body as it came, and as ``parse`` reads it. Large ones are looked over and parsed off the event loop.

    Raises:
        RequestError: too large, too slow, or not what ``parse`` wants. Overloaded: no room for it now.
    """
    service: Service = request.app.state.service
    limit, is_digested = service.settings.max_body_bytes, "idempotency-key" in request.headers

    def read(raw: bytearray) -> tuple[Received, T]:
        if len(raw) >= _SMALL_BODY:
            shape_of(raw, limit)
        return Received(len(raw), hashlib.sha256(raw).digest() if is_digested else b""), parse(raw)

    with service.bodies.claim(tenant_of(request)) as claim:
        raw = await timed_body(request, limit, claim)
        if len(raw) < _SMALL_BODY:
            return read(raw)
        return await service.off_loop(read, raw, size=len(raw), key=tenant_of(request))


async def timed_body(request: Request, limit: int, claim: Claim) -> bytearray:
    """The body, if it comes in time: ``body_seconds``, and as long again for each further 64 MiB that ``limit`` allows.

    Args:
        claim: for its memory.

    Raises:
        BodyTooLarge: it is over ``limit`` bytes. BodyTimeout: it is too slow. Overloaded: no room for it now.
    """
    service: Service = request.app.state.service
    seconds = service.settings.body_seconds * max(1, limit / _USUAL_LIMIT)
    try:
        async with asyncio.timeout(seconds):
            return await read_body(request, limit, claim)
    except TimeoutError:
        raise BodyTimeout(f"the body did not come within {seconds:g} s") from None


async def read_body(request: Request, limit: int, claim: Claim) -> bytearray:
    """The body, refused as soon as it is over the limit or there is no room for it.

    Raises:
        BodyTooLarge: the declared or the real length is over ``limit`` bytes. Aborted: the client left.
        Overloaded: no room for it now.
    """
    declared = request.headers.get("content-length", "")
    data = bytearray()
    if not declared.isdigit() or int(declared) <= limit:
        try:
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    break
                claim.grow(len(data))
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
