"""Threads for slow work off the event loop: short work does not wait for long work, nor one key's for another's."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

SHORT = 32 * 1024
"""Characters, or tokens, of work that is short: some 20 ms of tokenising."""

T = TypeVar("T")


class FairSemaphore:
    """A number of places that are taken in turn: a place that is left goes to the key that has waited longest since its
    last one. Used on the event loop alone.

    Args:
        places: how many there are.
        each: of them, how many one key may have.
    """

    def __init__(self, places: int, each: int | None = None) -> None:
        self._free, self._each = places, each or places
        self._taken: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, key: str) -> None:
        """Wait for a place. Every one is given back by :meth:`leave`."""
        if self._free and self._taken.get(key, 0) < self._each:
            self._give(key)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(key)  # it came just now
            raise

    def leave(self, key: str) -> None:
        """A place is free again."""
        self._free += 1
        self._taken[key] -= 1
        if not self._taken[key]:
            del self._taken[key]
        while self._free and (after := self._next()) is not None:
            self._give(after)

    def _give(self, key: str) -> None:
        self._free -= 1
        self._taken[key] = self._taken.get(key, 0) + 1

    def _next(self) -> str | None:
        """Whose turn it is: that one is told, and goes behind the other keys."""
        for key, turns in list(self._waiting.items()):
            while turns and turns[0].done():
                turns.popleft()  # nobody waits for it any more
            if not turns:
                del self._waiting[key]
            elif self._taken.get(key, 0) < self._each:
                turns.popleft().set_result(None)
                self._waiting.move_to_end(key)
                return key
        return None


class FairThreadPool:
    """Threads that keys take in turn.

    Args:
        name: of the threads.
        threads, each: how many there are, and how many of them one key may have.
    """

    def __init__(self, name: str, threads: int, each: int | None = None) -> None:
        self._slots = FairSemaphore(threads, each)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=f"pacellm-{name}")

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """What ``work`` returns, run in a thread. Whoever stops waiting keeps the place until the work has ended."""
        loop = asyncio.get_running_loop()
        await self._slots.take(key)
        try:
            done: Future[T] = self._pool.submit(work)
        except BaseException:
            self._slots.leave(key)
            raise
        done.add_done_callback(lambda _: _call(loop, self._slots.leave, key))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """Start nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class ThreadPools:
    """The pools of a server: for short work, for long work, for what reads or hashes whole sessions, and for grammars.

    Args:
        grammars: how many are compiled at once.
    """

    def __init__(self, grammars: int) -> None:
        self.short, self.long, self.bulk = (
            FairThreadPool("short", 2),
            FairThreadPool("long", 2),
            FairThreadPool("bulk", 1),
        )
        self.grammars = FairThreadPool("grammars", grammars, max(1, grammars - 1))

    def of(self, size: int) -> FairThreadPool:
        """The pool for work on ``size`` characters or tokens."""
        return self.short if size <= SHORT else self.long

    def close(self) -> None:
        """Start nothing more."""
        for pool in (self.short, self.long, self.bulk, self.grammars):
            pool.close()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[str], None], key: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, key)
