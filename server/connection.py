"""One connection: uvicorn's, with time limits, a limit on how many there are, and heads that are read strictly."""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from dataclasses import dataclass, field
from typing import Any, cast

import h11
from h11._receivebuffer import ReceiveBuffer, blank_line_regex
from h11._writers import ChunkedWriter
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import sse

logger = logging.getLogger("pacellm.wire")
MAX_HEAD_BYTES = 64 * 1024  # request line and headers together
_BATCHES = 4  # that may be accepted before the connections of the first one are counted
_OWN_FILES = 64  # descriptors for everything that is no connection: sessions' files, pipes, logs


@dataclass
class ConnectionLimits:
    """What connections may take, and those that there are. Used on the event loop alone.

    Attributes:
        most: connections at once. Beyond them the one that has waited longest without a request goes.
        head_seconds: in which a request's head must have come, from the connection's begin or its last answer's end.
        stall_seconds: that a client may take no byte of an answer.
        idle: connections without a request, those that wait longest first.
        turned_away: connections that were closed because there were too many.
        late: connections that were closed because a head or the client did not go on.
    """

    most: int = 1024
    head_seconds: float = 15.0
    stall_seconds: float = 60.0
    idle: dict[Connection, None] = field(default_factory=dict)
    turned_away: int = 0
    late: int = 0


_VERSION = re.compile(rb" HTTP/(\S+)$")


class _Head(ReceiveBuffer):
    """What has come; lines are taken out of it only where they end and go on as HTTP says, and no head is too long."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Head or trailers.

        Raises:
            h11.LocalProtocolError: what senders and proxies may read differently, or too much.
        """
        end = blank_line_regex.search(self._data, self._multiple_lines_search)
        head = b"" if end is None else bytes(self._data[: end.end()])
        lines = super().maybe_extract_lines()
        if lines is None:
            return None
        if len(head) > MAX_HEAD_BYTES:
            raise h11.LocalProtocolError("the head is too long", error_status_hint=431)
        if head.count(b"\n") != head.count(b"\r\n"):
            raise h11.LocalProtocolError("a line ends without a carriage return")
        if any(line[:1] in (b" ", b"\t") for line in lines):
            raise h11.LocalProtocolError("a header goes on in a second line")
        if lines and (version := _VERSION.search(lines[0])) is not None and version[1] not in (b"1.0", b"1.1"):
            raise h11.LocalProtocolError("this is HTTP/1.1", error_status_hint=505)
        names = {bytes(line.partition(b":")[0]).lower() for line in lines}
        if {b"content-length", b"transfer-encoding"} <= names:
            raise h11.LocalProtocolError("both Content-Length and Transfer-Encoding")
        return lines


class Connection(H11Protocol):
    """uvicorn's connection within limits.

    Attributes:
        limits: of all connections of a server; :func:`limited` sets them.
    """

    limits = ConnectionLimits()
    _timer: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room, or close it at once."""
        super().connection_made(transport)
        self.conn._receive_buffer = _Head()
        if len(self.connections) > self.limits.most and not self._make_room():
            self.limits.turned_away += 1
            logger.warning("a connection was closed: %d are answered, the most at once", self.limits.most)
            transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop()
        self._resume()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A head that goes on does not begin to wait anew."""
        super().data_received(data)
        self._settle()

    def handle_events(self) -> None:
        """A request that has come may be answered past uvicorn."""
        super().handle_events()
        if self.scope is not None:
            extensions = cast(dict[str, Any], self.scope.setdefault("extensions", {}))
            extensions[sse.PARTS] = self

    @property
    def takes_parts(self) -> bool:
        """The body is one of chunks, and the client takes more of it now."""
        if self.flow.write_paused or self.transport.is_closing():
            return False
        return type(self.conn._writer) is ChunkedWriter and self.conn.our_state is h11.SEND_BODY

    def write_part(self, data: bytes) -> None:
        """Write a part of the body, not an empty one, at once: uvicorn and h11 look at their whole state for each, and
        a stream has one for each token."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def send_400_response(self, msg: str) -> None:
        """An answer that has begun can only be cut."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """The next head is waited for from now on."""
        super().on_response_complete()
        self._settle()

    def pause_writing(self) -> None:
        """The client takes no more for now."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.limits.stall_seconds, self._give_up)

    def resume_writing(self) -> None:
        """It does again."""
        self._resume()
        super().resume_writing()

    def _settle(self) -> None:
        """Wait where nothing is being answered."""
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            self._stop()
        else:
            self._wait()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.head_seconds, self._give_up)
            self.limits.idle[self] = None

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.limits.idle.pop(self, None)

    def _resume(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _give_up(self) -> None:
        """Too slow."""
        self._timer = self._stall = None
        self.limits.late += 1
        self.limits.idle.pop(self, None)
        if self.conn.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE} and self.conn.trailing_data[0]:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _make_room(self) -> bool:
        """Close the connection that has waited longest without a request."""
        oldest = next(iter(self.limits.idle), None)
        if oldest is None:
            return False
        self.limits.turned_away += 1
        logger.warning("%d connections are open, the most at once: one without a request was closed", self.limits.most)
        oldest._stop()
        oldest.connections.discard(oldest)
        oldest.transport.abort()
        return True


def limited(limits: ConnectionLimits) -> type[Connection]:
    """The protocol of a server's connections."""
    return type("Connection", (Connection,), {"limits": limits})


def room_for(wanted: int) -> tuple[int, int]:
    """How many connections the process may have, and how many of them it may accept in one go, after raising the soft
    limit of descriptors as far as the hard one allows.

    Args:
        wanted: connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    batch = max(2, wanted // 8)
    needed = wanted + _BATCHES * batch + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted, batch
    left = soft - min(_OWN_FILES, soft // 2)
    batch = max(2, left // 8)
    most = max(2, left - _BATCHES * batch)
    logger.warning("%d descriptors allow for %d connections only; raise ulimit -n", soft, most)
    return most, batch
