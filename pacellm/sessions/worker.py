"""One thread for what must not hold a step up: copies to the host, reads and writes of the session directory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def _last() -> None:
    """The job that ends a worker's thread."""


class Worker:
    """One thread that runs jobs in order. Results are taken by the owner, in its own thread, by :meth:`poll`.

    Args:
        on_error: told what was raised by whoever took a result; such a failure ends nothing else.
        wakeup: notified after each job; the owner may wait for it.
    """

    def __init__(self, on_error: Callable[[Exception], None], wakeup: threading.Condition) -> None:
        self._on_error, self._wakeup = on_error, wakeup
        self._jobs: deque[tuple[Callable[[], Any], Future[Any], Callable[[Future[Any]], None]]] = deque()
        self._done: deque[tuple[Future[Any], Callable[[Future[Any]], None]]] = deque()
        self._changed = threading.Condition()
        self._open = 0
        self._thread: threading.Thread | None = None

    @property
    def num_open(self) -> int:
        """Jobs whose result was not taken yet."""
        return self._open

    @property
    def has_results(self) -> bool:
        """A job has ended and :meth:`poll` would say so."""
        return bool(self._done)

    def submit(self, job: Callable[[], Any], then: Callable[[Future[Any]], None]) -> Future[Any]:
        """Run ``job`` in the worker's thread, and later ``then`` with its future inside :meth:`poll`."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # whoever waits for it may leave, but not take the job away
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="pacellm-mover", daemon=True)
                self._thread.start()
            self._open += 1
            self._jobs.append((job, future, then))
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """End the thread after the jobs that wait; a later job starts another."""
        with self._changed:
            if self._thread is not None:
                self._jobs.append((_last, Future(), lambda done: None))
                self._changed.notify_all()
                self._thread = None

    def poll(self) -> None:
        """Take the results of jobs that have ended."""
        while self._done:
            future, then = self._done.popleft()
            self._open -= 1
            try:
                then(future)
            except Exception as error:
                self._on_error(error)

    def wait(self, timeout: float) -> None:
        """Until a job has ended, or ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._done) or not self._open, timeout)

    def finish(self) -> None:
        """Wait for every job and take its result, those that results start included."""
        while self._open:
            self.wait(1.0)
            self.poll()

    def _main(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                job, future, then = self._jobs.popleft()
            if job is _last:
                return
            try:
                future.set_result(job())
            except BaseException as error:  # handed to whoever takes the result
                future.set_exception(error)
            with self._changed:
                self._done.append((future, then))
                self._changed.notify_all()
            del job, future, then  # a waiting thread keeps nobody's memory
            with self._wakeup:
                self._wakeup.notify_all()
