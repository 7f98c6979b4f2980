"""Events for one reader. However many come at once, they cost one wake-up of its task and no timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pacellm.types import Event

Numbered = tuple[int, Event]
"""An event and the number of the generation, among those of its HTTP request, that it is of."""


class EventQueue:
    """Events in the order they came, for one task at a time; used on the event loop alone.

    The clock of a wait is looked at only when it may have run out, so that a reader that waits anew for each token
    does not set and cancel a timer each time.

    Attributes:
        take_at_once: is shown each event that comes while the reader waits and nothing is before it; where it returns
            True the event was taken, and the reader sleeps on.
    """

    def __init__(self) -> None:
        self._events: list[Numbered] = []
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timeout: float | None = None  # of the wait, in seconds
        self._deadline: float | None = None  # of the wait, in the loop's time
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self.take_at_once: Callable[[int, Event], bool] | None = None

    @property
    def is_empty(self) -> bool:
        """None is there."""
        return not self._events

    def push(self, number: int, event: Event) -> None:
        """Add one."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._events.append((number, event))
        elif self.take_at_once is not None and self.take_at_once(number, event):
            if self._timeout is not None:
                self._deadline = self._loop.time() + self._timeout
        else:
            self._events.append((number, event))
            waiter.set_result(None)

    async def get(self, timeout: float | None) -> list[Numbered]:
        """All that are there, at least one; none after ``timeout`` seconds without."""
        if not self._events:
            self._timeout = timeout
            if timeout is not None:
                self._deadline = self._loop.time() + timeout
                if self._timer is None or self._rings_at > self._deadline:
                    self._set_timer(self._deadline)
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = self._deadline = None
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, at: float) -> None:
        self.close()
        self._timer, self._rings_at = self._loop.call_at(at, self._ring), at

    def _ring(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._loop.time() < self._deadline:
            self._set_timer(self._deadline)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
