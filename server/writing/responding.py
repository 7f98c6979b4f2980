"""An answer to HTTP: server-sent events, or one JSON object, unless the client goes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pacellm.errors import Aborted, PaceError

from .. import sse
from ..service import Service
from .answer import Answer, Chunk, Wire


class Fold(Protocol):
    """A stream's chunks, added up."""

    def add(self, chunk: Chunk) -> None:
        """Add one."""

    def whole(self) -> Chunk:
        """The non-streamed answer."""


async def streamed(service: Service, answer: Answer, wire: Wire) -> sse.EventStream:
    """The answer as server-sent events, once admission is known or ``header_wait`` has passed.

    Raises:
        PaceError: the request failed before that.
    """
    try:
        headers = await answer.admitted(service.settings.header_wait)
    except BaseException:
        answer.close()
        raise
    events = _events(answer, wire, service.settings.keep_alive_seconds)
    return sse.EventStream(events, answer.close, headers, at_once=answer.write_at_once)


async def _events(answer: Answer, wire: Wire, timeout: float) -> AsyncIterator[bytes | None]:
    """Bytes of whole events; None after ``timeout`` seconds of silence. A failure is an event too."""
    try:
        while not answer.is_whole:
            parts = await answer.next(timeout)
            if parts is None:
                yield None
            elif answer.is_whole:
                yield sse.Last(answer.as_events(parts) + wire.done)
            elif parts:
                yield answer.as_events(parts)
    except PaceError as error:
        yield wire.failed(error)


async def whole(request: Request, answer: Answer, fold: Fold) -> Response:
    """The answer in one piece.

    Raises:
        PaceError: the request failed, or its client disconnected.
    """
    folded = asyncio.ensure_future(_folded(answer, fold))
    gone = asyncio.create_task(sse.disconnected(request.receive))
    try:
        await asyncio.wait({folded, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not folded.done():
            raise Aborted("the client disconnected")
        return JSONResponse(folded.result(), headers=answer.headers)
    finally:
        for task in (folded, gone):
            task.cancel()
        answer.close()  # before anything is waited for: a wait may be cancelled too
        await asyncio.gather(folded, gone, return_exceptions=True)


async def _folded(answer: Answer, fold: Fold) -> Chunk:
    while not answer.is_whole:
        for part in await answer.next() or ():
            assert not isinstance(part, bytes)  # events are written for streams alone
            fold.add(part)
    return fold.whole()
