"""Events for one reader. An event costs one wake-up of its task and no timer."""

from __future__ import annotations

import asyncio
from collections import deque

from pacellm.types import Event


class EventQueue:
    """Events in the order they came, for one task at a time; used on the event loop alone.

    The clock of a wait is looked at only when it may have run out, so that a reader that waits anew for each token
    does not set and cancel a timer each time.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: float | None = None  # of the wait, in the loop's time
        self._timer: asyncio.TimerHandle | None = None

    def push(self, event: Event) -> None:
        """Add one."""
        self._events.append(event)
        self._wake()

    async def get(self, timeout: float | None) -> Event | None:
        """The next one, or None after ``timeout`` seconds without."""
        if not self._events:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            self._watch(loop, timeout)
            try:
                await waiter
            finally:
                self._waiter = self._deadline = None
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self, loop: asyncio.AbstractEventLoop, timeout: float | None) -> None:
        """Have a timer that goes off at the deadline or before."""
        if timeout is None:
            return
        self._deadline = loop.time() + timeout
        if self._timer is not None and self._timer.when() > self._deadline:
            self.close()
        if self._timer is None:
            self._timer = loop.call_at(self._deadline, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if loop.time() < self._deadline:
            self._timer = loop.call_at(self._deadline, self._ring, loop)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
