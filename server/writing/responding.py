"""Chunks to HTTP: server-sent events, or one JSON object, unless the client goes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pacellm.errors import Aborted, PaceError
from pacellm.types import Admitted

from .. import sse
from ..errors import body_of
from ..service import Generation, Service

Chunk = dict[str, Any]
ChunkSource = Callable[..., AsyncIterator[Chunk | None]]


class Closable(Protocol):
    """What an answer is made from; closing it cancels what has not ended."""

    def close(self) -> None:
        """Forget it."""


async def streamed(
    service: Service,
    generation: Generation,
    chunks: ChunkSource,
    *,
    wants_usage: bool,
    whole: Closable | None = None,
) -> sse.EventStream:
    """The answer as server-sent events, once admission is known or ``header_wait`` has passed.

    Args:
        generation: the one whose admission is waited for.
        whole: what is closed with the answer, where that is more than ``generation``.

    Raises:
        PaceError: the request failed before that.
    """
    owner = whole or generation
    try:
        headers = await session_headers(service, generation)
    except BaseException:
        owner.close()
        raise
    return sse.EventStream(_events(service, chunks, wants_usage), owner.close, headers)


async def session_headers(service: Service, generation: Generation) -> dict[str, str]:
    """What admission found, as headers of a stream; "queued" where it has not come yet.

    Raises:
        PaceError: the request failed before that.
    """
    found = await generation.admitted(service.settings.header_wait)
    return headers_of(found) if found is not None else {"X-PaceLLM-Session": "queued"}


def headers_of(found: Admitted, session: str | None = None) -> dict[str, str]:
    """What admission found, as headers.

    Args:
        session: what became of it, where the endpoint knows better.
    """
    headers = {"X-PaceLLM-Session": session or found.session}
    if found.session != "none":
        headers["X-PaceLLM-Dropped-Tokens"] = str(found.kinship.dropped_tokens)
    return headers


async def _events(service: Service, chunks: ChunkSource, wants_usage: bool) -> AsyncIterator[bytes]:
    """Bytes of whole events; a failure after the head is an event too."""
    try:
        async for chunk in chunks(service.settings.keep_alive_seconds):
            if chunk is None:
                yield sse.KEEP_ALIVE
            elif chunk["choices"] or "prompt_progress" in chunk or "pacellm" in chunk or wants_usage:
                yield sse.event(chunk)
        yield sse.DONE
    except PaceError as error:
        yield sse.event(body_of(error))


async def whole(
    request: Request, generation: Closable, answer: Awaitable[Chunk], found: Callable[[], dict[str, str]]
) -> Response:
    """The answer in one piece.

    Args:
        found: once the answer is there: what admission found, as headers.

    Raises:
        PaceError: the request failed, or its client disconnected.
    """
    folded = asyncio.ensure_future(answer)
    gone = asyncio.create_task(sse.disconnected(request.receive))
    try:
        await asyncio.wait({folded, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not folded.done():
            raise Aborted("the client disconnected")
        return JSONResponse(folded.result(), headers=found())
    finally:
        for task in (folded, gone):
            task.cancel()
        generation.close()  # before anything is waited for: a wait may be cancelled too
        await asyncio.gather(folded, gone, return_exceptions=True)
