"""Idempotency-Key: an equal request gets the stored answer instead of a second generation."""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import Response

from pacellm.errors import Conflict, RequestError

from . import sse
from .auth import tenant_of

KEY = r"^[\x21-\x7e]{1,255}$"
_SECONDS = 3600.0


def key_of(request: Request) -> str | None:
    """The request's key, if it has one.

    Raises:
        RequestError: it is malformed.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not re.match(KEY, key):
        raise RequestError("Idempotency-Key must be 1 to 255 printable ASCII characters", param="Idempotency-Key")
    return key


@dataclass
class _Record:
    fingerprint: bytes
    body: bytes | None = None  # None while the first answer is being made
    media_type: str = ""
    at: float = 0.0


class Idempotency:
    """Answers by (tenant, key), kept for an hour within a byte budget, least recently stored first out.

    Only complete answers are stored: after a failure or a lost client the key is free again.

    Args:
        max_bytes: of stored answers.
    """

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._records: OrderedDict[tuple[str, str], _Record] = OrderedDict()

    async def answer(
        self, request: Request, key: str | None, digest: bytes, start: Callable[[], Awaitable[Response]]
    ) -> Response:
        """The stored answer, or what ``start`` answers.

        Args:
            key: None where the request has none.
            digest: of the request's body; with path and session it is what must be equal.

        Raises:
            Conflict: the first request with this key is still being answered.
            RequestError: the key came with another request.
        """
        if key is None:
            return await start()
        place = (tenant_of(request), key)
        told = (request.url.path, request.headers.get("x-session-id", ""))
        fingerprint = hashlib.sha256("\0".join(told).encode() + b"\0" + digest).digest()
        self._expire()
        record = self._records.get(place)
        if record is not None:
            return self._replay(record, fingerprint)
        self._records[place] = record = _Record(fingerprint)
        return await self._first(place, record, start)

    def _replay(self, record: _Record, fingerprint: bytes) -> Response:
        if record.fingerprint != fingerprint:
            raise RequestError(
                "this Idempotency-Key came with another request", param="Idempotency-Key", code="idempotency_key_reused"
            )
        if record.body is None:
            raise Conflict("the first request with this Idempotency-Key is still being answered")
        return Response(record.body, media_type=record.media_type, headers={"Idempotent-Replayed": "true"})

    async def _first(
        self, place: tuple[str, str], record: _Record, start: Callable[[], Awaitable[Response]]
    ) -> Response:
        try:
            response = await start()
        except BaseException:
            self._drop(place, record)
            raise
        if isinstance(response, sse.EventStream):
            response.record(self._recorder(place, record), lambda: self._over(place, record))
        else:
            self._store(place, record, bytes(response.body), response.media_type or "application/json")
        return response

    def _recorder(self, place: tuple[str, str], record: _Record) -> Callable[[bytes], None]:
        """Takes a stream's parts, and stores them once they are whole."""
        parts: list[bytes] = []

        def take(part: bytes) -> None:
            parts.append(part)
            if isinstance(part, sse.Last):
                self._store(place, record, b"".join(parts), "text/event-stream")

        return take

    def _store(self, place: tuple[str, str], record: _Record, body: bytes, media_type: str) -> None:
        record.body, record.media_type, record.at = body, media_type, time.monotonic()
        self._records.move_to_end(place)
        self._bytes += len(body)
        while self._bytes > self._max_bytes:
            oldest = next(key for key, other in self._records.items() if other.body is not None)
            self._drop(oldest, self._records[oldest])

    def _over(self, place: tuple[str, str], record: _Record) -> None:
        """A stream has ended; an incomplete one leaves nothing."""
        if record.body is None:
            self._drop(place, record)

    def _drop(self, place: tuple[str, str], record: _Record) -> None:
        if self._records.get(place) is record:
            del self._records[place]
            self._bytes -= len(record.body or b"")

    def _expire(self) -> None:
        limit = time.monotonic() - _SECONDS
        for place, record in list(self._records.items()):
            if record.body is not None and record.at < limit:
                self._drop(place, record)
            elif record.body is not None:
                break
