"""Events for one reader. However many come at once, they cost one wake-up of its task and no timer."""

from __future__ import annotations

import asyncio

from pacellm.types import Event

Numbered = tuple[int, Event]
"""An event and the number of the generation, among those of its HTTP request, that it is of."""


class EventQueue:
    """Events in the order they came, for one task at a time; used on the event loop alone.

    The clock of a wait is looked at only when it may have run out, so that a reader that waits anew for each token
    does not set and cancel a timer each time.
    """

    def __init__(self) -> None:
        self._events: list[Numbered] = []
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: float | None = None  # of the wait, in the loop's time
        self._timer: asyncio.TimerHandle | None = None

    def push(self, number: int, event: Event) -> None:
        """Add one."""
        self._events.append((number, event))
        self._wake()

    async def get(self, timeout: float | None) -> list[Numbered]:
        """All that are there, at least one; none after ``timeout`` seconds without."""
        if not self._events:
            self._waiter = self._loop.create_future()
            if timeout is not None:
                self._watch(self._loop.time() + timeout)
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

    def _watch(self, deadline: float) -> None:
        """Have a timer that goes off at the deadline or before."""
        self._deadline = deadline
        if self._timer is not None and self._timer.when() > deadline:
            self.close()
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._ring)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
