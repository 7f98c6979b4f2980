"""One thread for what must not hold a step up: copies to the host, reads and writes of the session directory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pacellm.sessions.atomic import is_full


def _last() -> None:
    """The job that ends a worker's thread."""


@dataclass
class _Job:
    run: Callable[[], Any]
    then: Callable[[Future[Any]], None] = lambda done: None
    needs_room: bool = False
    future: Future[Any] = field(default_factory=Future)
    was_full: OSError | None = None


class Worker:
    """One thread that runs jobs in order. Results are taken by the owner, in its own thread, by :meth:`poll`.

    Args:
        on_error: told what was raised by whoever took a result; such a failure ends nothing else.
        wakeup: notified after each job; the owner may wait for it.

    Attributes:
        make_room: asked by :meth:`poll` where the disk was full for a job that needs room; whether it made some.
    """

    def __init__(self, on_error: Callable[[Exception], None], wakeup: threading.Condition) -> None:
        self._on_error, self._wakeup = on_error, wakeup
        self.make_room: Callable[[], bool] = lambda: False
        self._jobs: deque[_Job] = deque()
        self._done: deque[_Job] = deque()
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

    def submit(
        self, job: Callable[[], Any], then: Callable[[Future[Any]], None], *, needs_room: bool = False
    ) -> Future[Any]:
        """Run ``job`` in the worker's thread, and later ``then`` with its future inside :meth:`poll`.

        Args:
            needs_room: where the disk is full for it, it runs again for as long as room can be made.
        """
        queued = _Job(job, then, needs_room)
        queued.future.set_running_or_notify_cancel()  # whoever waits for it may leave, but not take the job away
        self._open += 1
        self._queue(queued)
        return queued.future

    def _queue(self, job: _Job) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="pacellm-mover", daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread after the jobs that wait; a later job starts another."""
        with self._changed:
            if self._thread is not None:
                self._jobs.append(_Job(_last))
                self._changed.notify_all()
                self._thread = None

    def poll(self) -> None:
        """Take the results of jobs that have ended."""
        while self._done:
            job = self._done.popleft()
            if job.was_full is not None:
                if self._has_made_room():
                    job.was_full = None
                    self._queue(job)
                    continue
                job.future.set_exception(job.was_full)
            self._open -= 1
            try:
                job.then(job.future)
            except Exception as error:
                self._on_error(error)

    def _has_made_room(self) -> bool:
        try:
            return self.make_room()
        except Exception as error:
            self._on_error(error)
            return False

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
                job = self._jobs.popleft()
            if job.run is _last:
                return
            self._run(job)
            with self._changed:
                self._done.append(job)
                self._changed.notify_all()
            del job  # a waiting thread keeps nobody's memory
            with self._wakeup:
                self._wakeup.notify_all()

    def _run(self, job: _Job) -> None:
        try:
            job.future.set_result(job.run())
        except BaseException as error:  # handed to whoever takes the result
            if job.needs_room and is_full(error):
                job.was_full = error
            else:
                job.future.set_exception(error)
