"""How far a prompt has come, for streams that ask: its place while queued, its tokens while it is read."""

from __future__ import annotations

import time
from typing import Any

from pacellm.types import Progress

from ..generation import Generation
from ..service import Service


class PromptProgress:
    """Progress of one generation, in llama.cpp's form and with the place in the queue.

    Args:
        generation: submitted.
        service: where it was submitted.
    """

    def __init__(self, generation: Generation, service: Service) -> None:
        self._generation, self._service = generation, service
        self._started = generation.request.arrival
        self._is_queued, self._cached = True, 0
        self._shown: dict[str, int | None] | None = None

    def admitted(self, cached_tokens: int) -> None:
        """It left the queue; so many tokens of it need not be read."""
        self._is_queued, self._cached = False, cached_tokens

    def queued(self) -> dict[str, Any] | None:
        """Its place in the queue, where that is another than was told last."""
        place = self._service.place(self._generation) if self._is_queued else None
        if place is None or place == self._shown:
            return None
        self._shown = place
        return {**self._counts(len(self._generation.request.prompt), 0, 0), "queue": place}

    def read(self, event: Progress) -> dict[str, Any]:
        """How much of it is read."""
        return self._counts(event.total + self._cached, self._cached, event.processed + self._cached)

    def _counts(self, total: int, cached: int, processed: int) -> dict[str, Any]:
        """Tokens, milliseconds since the request was queued, and those still to come at the pace so far."""
        spent = time.monotonic() - self._started
        new = processed - cached
        left = round(1000 * spent * (total - processed) / new) if new > 0 else None
        return {
            "total": total,
            "cached": cached,
            "cache": cached,  # as llama.cpp calls it
            "processed": processed,
            "time_ms": round(1000 * spent),
            "estimated_ms": left,
        }
