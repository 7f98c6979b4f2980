"""How far a prompt has come, for streams that ask: its place while queued, its tokens while it is read."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from pacellm.types import Admitted, Event, Progress

from ..service import Generation, Service


def events_of(
    generation: Generation, service: Service, timeout: float | None, *, with_progress: bool
) -> AsyncIterator[Event | dict[str, Any] | None]:
    """A generation's events; in a stream that asked for it (``timeout`` is set) its progress between them."""
    if with_progress and timeout is not None:
        return PromptProgress(generation, service).events(timeout)
    return generation.events(timeout)


class PromptProgress:
    """Progress of one generation, in llama.cpp's form and with the place in the queue.

    Args:
        generation: submitted.
        service: where it was submitted.
    """

    def __init__(self, generation: Generation, service: Service) -> None:
        self._generation, self._service = generation, service
        self._started = generation.request.arrival
        self._cached = 0

    async def events(self, timeout: float) -> AsyncIterator[Event | dict[str, Any] | None]:
        """The generation's events, a dict for each piece of progress, None after ``timeout`` seconds of silence."""
        every, silence = min(self._service.settings.progress_seconds, timeout), 0.0
        is_queued, shown = True, None
        async for event in self._generation.events(every):
            if event is None:
                silence += every
                place = self._service.place(self._generation) if is_queued else None
                if place is not None and place != shown:
                    silence, shown = 0.0, place
                    yield self._queued(place)
                elif silence >= timeout:
                    silence = 0.0
                    yield None
                continue
            silence = 0.0
            if isinstance(event, Admitted):
                is_queued, self._cached = False, event.cached_tokens
            yield self._read(event) if isinstance(event, Progress) else event

    def _queued(self, place: dict[str, int | None]) -> dict[str, Any]:
        total = len(self._generation.request.prompt)
        return {**self._counts(total, 0, 0), "queue": place}

    def _read(self, event: Progress) -> dict[str, Any]:
        return self._counts(event.total + self._cached, self._cached, event.processed + self._cached)

    def _counts(self, total: int, cached: int, processed: int) -> dict[str, Any]:
        """Tokens, milliseconds since the request was queued, and those still to come at the pace so far."""
        spent = time.monotonic() - self._started
        new = processed - cached
        left = round(1000 * spent * (total - processed) / new) if new > 0 else None
        return {
            "total": total,
            "cached": cached,
            "processed": processed,
            "time_ms": round(1000 * spent),
            "estimated_ms": left,
        }
