"""A request that was handed to the engine, as the HTTP side follows it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Protocol

from pacellm.types import Admitted, Delta, Event, GenerationRequest, Progress

from .auth import Caller
from .event_queue import EventQueue


class Router(Protocol):
    """What brings events to generations."""

    def cancel(self, generation: Generation) -> None:
        """Cancel its request, and go on bringing what the engine tells of it."""

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

    Attributes:
        push: takes an event; called on the event loop.
        has_ended: its last event has come.
        progress: what of the prompt was read; None while it is queued. num_generated: tokens since then.
        deadline: goes off when its answer is to be complete.
    """

    def __init__(
        self, router: Router, request: GenerationRequest, caller: Caller, events: EventQueue, number: int = 0
    ) -> None:
        self.request, self.caller, self.has_ended = request, caller, False
        self.deadline: asyncio.TimerHandle | None = None
        self.progress: Progress | None = None
        self.num_generated = 0
        self._router, self._events = router, events
        self.push: Callable[[Event], None] = functools.partial(events.push, number)

    def follow(self, event: Event) -> None:
        """Note how far it has come."""
        if type(event) is Delta:
            self.num_generated += len(event.token_ids)
        elif type(event) is Progress:
            self.progress = event
        elif type(event) is Admitted:
            self.progress = Progress(0, 0)

    def cancel(self) -> None:
        """Cancel the request where it has not ended; its last event is still to come."""
        if not self.has_ended:
            self._router.cancel(self)

    def close(self) -> None:
        """Forget the request; cancel it where it has not ended."""
        self._events.close()
        self._router.forget(self, abort=not self.has_ended)
