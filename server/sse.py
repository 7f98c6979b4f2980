"""Server-sent events: a response that notices at once when its client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from json.encoder import encode_basestring
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
PARTS = "pacellm.parts"
"""An ASGI extension: a :class:`PartWriter`, past all middleware, which looks at heads and ends alone."""
to_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once


class PartWriter(Protocol):
    """Writes parts of a body (:class:`.connection.Connection`)."""

    @property
    def takes_parts(self) -> bool:
        """A part can be written now; else ``send`` must be awaited with it."""

    def write_part(self, data: bytes) -> None:
        """Write one that is not empty."""


class _Sender:
    """In the place of a connection that cannot: everything is awaited."""

    takes_parts = False

    def write_part(self, data: bytes) -> None:
        raise NotImplementedError


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return f"data: {to_json(data)}\n\n".encode()


def typed_event(data: dict[str, Any]) -> bytes:
    """One event that is named by its ``type``."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


class TextEvent:
    """An event of which only one text changes: all else is written once.

    Args:
        written: the event with ``HOLE`` for the text.
    """

    HOLE = "\ufdd0"

    def __init__(self, written: bytes) -> None:
        self._head, self._tail = written.decode().split(to_json(self.HOLE))

    def __call__(self, text: str) -> bytes:
        """The event with this text."""
        return f"{self._head}{encode_basestring(text)}{self._tail}".encode()


class Last(bytes):
    """The last part of a stream that is whole."""


class EventStream(Response):
    """Sends what an iterator yields until it ends or the client disconnects.

    Args:
        source: bytes of whole events; None where it has been silent for long.
        close: called once the response is over, however it ended and even where the source never began.
        headers: added to the response.
        at_once: is given what writes parts once the head is out, for a source that does not always wait to be asked.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncIterator[bytes | None],
        close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
        *,
        at_once: Callable[[PartWriter], None] = lambda writer: None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._source, self._close, self._at_once = source, close, at_once
        self._record: Callable[[bytes], None] | None = None

    def record(self, part: Callable[[bytes], None], close: Callable[[], None]) -> None:
        """Let ``part`` see each part before it is sent, and ``close`` be called too when the response is over."""
        first, self._record = self._close, part

        def both() -> None:
            first()
            close()

        self._close = both

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, then events until the source or the client ends."""
        writer = scope.get("extensions", {}).get(PARTS) or _Sender()
        pump = asyncio.create_task(self._pump(send, writer))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not pump.done():
                pump.cancel()
            self._close()
            await asyncio.gather(pump, gone, return_exceptions=True)
        if not pump.cancelled() and (error := pump.exception()) is not None and not isinstance(error, OSError):
            raise error

    async def _pump(self, send: Send, writer: PartWriter) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._at_once(writer if self._record is None else _Recorded(writer, self._record))
        async for part in self._source:
            if part is not None and self._record is not None:
                self._record(part)
            data = KEEP_ALIVE if part is None else part
            if data and writer.takes_parts:
                writer.write_part(data)
            else:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Recorded:
    """Shows parts to somebody before they are written."""

    def __init__(self, writer: PartWriter, record: Callable[[bytes], None]) -> None:
        self._writer, self._record = writer, record

    @property
    def takes_parts(self) -> bool:
        return self._writer.takes_parts

    def write_part(self, data: bytes) -> None:
        self._record(data)
        self._writer.write_part(data)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
