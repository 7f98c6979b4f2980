"""Bodies and the few headers that say more about a request."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from pacellm.errors import Aborted, BodyTimeout, BodyTooLarge, RequestError

from .auth import tenant_of
from .body_budget import Claim
from .content_encoding import decoder_of
from .idempotency import key_of
from .json_shape import shape_of
from .schema import RESPONSE_PREFIX, SESSION_ID
from .service import Service

_SMALL_BODY = 16 * 1024
_USUAL_LIMIT = 64 * 2**20
T = TypeVar("T")


Parse = Callable[[bytes | bytearray], T]


class Digest(Protocol):
    """Adds bytes up, as hashlib's do."""

    def update(self, data: bytes, /) -> None:
        """More of them."""


class ReceivedBody:
    """A body as it came, held until it is parsed.

    Args:
        raw: unpacked.
        digest: empty where nothing asks for one.
        claim: for its memory.
    """

    def __init__(self, raw: bytearray, digest: bytes, claim: Claim) -> None:
        self._raw, self._claim = raw, claim
        self.size, self.digest = len(raw), digest

    async def parsed(self, request: Request, parse: Parse[T]) -> T:
        """The body as ``parse`` reads it, once. Large ones are looked over and parsed off the event loop.

        Raises:
            RequestError: not what ``parse`` wants.
        """
        service: Service = request.app.state.service
        raw, self._raw = self._raw, bytearray()

        def read() -> T:
            shape_of(raw, service.settings.max_body_bytes)
            return parse(raw)

        try:
            if self.size < _SMALL_BODY:
                return parse(raw)
            return await service.off_loop(read, size=self.size, key=tenant_of(request))
        finally:
            self._claim.release()


async def parsed(request: Request, parse: Parse[T]) -> tuple[int, T]:
    """The body's size in bytes, and what ``parse`` makes of it.

    Raises:
        RequestError: too large, too slow, or not what ``parse`` wants. Overloaded: no room for it now.
    """
    service: Service = request.app.state.service
    with service.bodies.claim(tenant_of(request)) as claim:
        raw = await timed_body(request, service.settings.max_body_bytes, claim)
        body = ReceivedBody(raw, b"", claim)
        return body.size, await body.parsed(request, parse)


async def answered(request: Request, parse: Parse[T], answer: Callable[[int, T], Awaitable[Response]]) -> Response:
    """The answer of an endpoint that generates. Whatever can be refused, or answered again, without knowing what a body
    says is so before it is parsed, which may have to wait for others.

    Args:
        answer: called with the body's size in bytes and with what ``parse`` has read.

    Raises:
        PaceError: it is refused.
    """
    service: Service = request.app.state.service
    tenant, key = tenant_of(request), key_of(request)
    with service.bodies.claim(tenant) as claim:
        digest = None if key is None else hashlib.sha256()
        raw = await timed_body(request, service.settings.max_body_bytes, claim, digest)
        received = ReceivedBody(raw, b"" if digest is None else digest.digest(), claim)
        del raw

        async def start() -> Response:
            service.check_turn(tenant)
            body = await received.parsed(request, parse)
            return await answer(received.size, body)

        return await service.idempotency.answer(request, key, received.digest, start)


async def timed_body(request: Request, limit: int, claim: Claim, digest: Digest | None = None) -> bytearray:
    """The body, if it comes in time: ``body_seconds``, and as long again for each further 64 MiB that ``limit`` allows.

    Args:
        claim, digest: as for :func:`read_body`.

    Raises:
        BodyTooLarge: it is over ``limit`` bytes. BodyTimeout: it is too slow. Overloaded: no room for it now.
    """
    service: Service = request.app.state.service
    seconds = service.settings.body_seconds * max(1, limit / _USUAL_LIMIT)
    try:
        async with asyncio.timeout(seconds):
            return await read_body(request, limit, claim, digest)
    except TimeoutError:
        raise BodyTimeout(f"the body did not come within {seconds:g} s") from None


async def read_body(request: Request, limit: int, claim: Claim, digest: Digest | None = None) -> bytearray:
    """The body, unpacked where it was sent packed; refused as soon as it is over the limit or there is no room for it.

    Args:
        claim: for its memory.
        digest: told all of it.

    Raises:
        BodyTooLarge: the declared or the real length, packed or not, is over ``limit`` bytes.
        Aborted: the client left. Overloaded: no room for it now.
        RequestError: it is packed in another way than its head says, or than this server reads.
    """
    decoder = decoder_of(request.headers.get("content-encoding", ""))
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    data = bytearray()
    try:
        async for part in request.stream():
            for number, piece in enumerate(decoder.pieces(part)):
                if number:
                    await asyncio.sleep(0)  # a small part may come to many pieces
                if len(data) + len(piece) > limit:
                    raise _too_large(limit)
                data += piece
                if digest is not None:
                    digest.update(piece)
                claim.grow(len(data))
    except ClientDisconnect:
        raise Aborted("the client disconnected before its request was complete") from None
    decoder.close()
    return data


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is over the limit of {limit:,} bytes")


def session_header(request: Request) -> str | None:
    """The session that the header names.

    Raises:
        RequestError: it is malformed.
    """
    header = request.headers.get("x-session-id")
    if header is not None and not re.match(SESSION_ID, header):
        raise RequestError("X-Session-ID must be 1 to 256 of A-Z a-z 0-9 . _ : -", param="X-Session-ID")
    return header


def session_of(header: str | None, named: str | None) -> str | None:
    """The session that header or body name.

    Args:
        named: the body's ``session_id``.

    Raises:
        RequestError: they name different ones, or a stored response's.
    """
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
