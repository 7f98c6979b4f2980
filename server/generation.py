"""A request that was handed to the engine, as the HTTP side follows it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pacellm.types import Event, Failed, Finished, GenerationRequest

from .auth import Caller
from .event_queue import EventQueue


class Router(Protocol):
    """What brings events to generations."""

    def forget(self, generation: Generation, *, abort: bool) -> None:
        """Bring it no more; ``abort`` cancels its request."""


class Generation:
    """A submitted request. Whoever submitted it closes it: that cancels the request where it has not ended.

    Args:
        router: what brings its events.
        request: as the engine has it.
        caller: who asked.
        events: gets its events.
        number: among the generations that share ``events``.
    """

    def __init__(
        self, router: Router, request: GenerationRequest, caller: Caller, events: EventQueue, number: int = 0
    ) -> None:
        self.request, self.caller, self.number = request, caller, number
        self.deadline: asyncio.TimerHandle | None = None
        self._router, self._events = router, events
        self._has_ended = False

    def push(self, event: Event) -> None:
        """Called on the event loop."""
        self._has_ended = self._has_ended or isinstance(event, Finished | Failed)
        self._events.push(self.number, event)

    def close(self) -> None:
        """Forget the request; cancel it where it has not ended."""
        self._events.close()
        self._router.forget(self, abort=not self._has_ended)
