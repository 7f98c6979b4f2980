"""The engine in a thread of its own: an inbox in, batches of events out.

Whoever submits gets every event of its request through one callback, called from the engine thread with all events
of a step at once. Exactly one terminal event (Finished or Failed) reaches every submitted request, also when it is
aborted, when the server drains, and when the engine dies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pacellm.engine.engine import Engine
from pacellm.errors import Aborted, Draining, EngineDead, EngineError, Overloaded, PaceError, reason
from pacellm.sessions.operation_queue import Operation
from pacellm.types import Admitted, Event, Failed, Finished, GenerationRequest

logger = logging.getLogger("pacellm.engine")
Deliver = Callable[[list[tuple[str, Event]]], None]
_IDLE_BEAT = 1.0  # seconds between heartbeats while idle


class EngineThread:
    """Owns an engine and the thread it runs in.

    Args:
        engine: used by this thread alone from :meth:`start` on, ``check`` and ``stats`` apart.
        deliver: called in the engine thread with the events of a step; where it raises, none of them was taken.
    """

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        self.engine, self._deliver = engine, deliver
        # a string is the id of a request to abort, a pair a session operation
        self._inbox: deque[GenerationRequest | str | tuple[Operation, Future[Any]]] = deque()
        self._wake = engine.wakeup
        self._queued: dict[str, GenerationRequest] = {}  # in order of arrival, not yet admitted
        self._submitted: set[str] = set()
        self._stopping = False
        self._draining = False
        self._error: BaseException | None = None
        self.heartbeat = time.monotonic()
        self._is_saving = False
        self._thread = threading.Thread(target=self._main, name="pacellm-engine", daemon=True)

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """The loop runs."""
        return self._thread.is_alive() and self._error is None

    @property
    def is_draining(self) -> bool:
        """No new requests are taken."""
        return self._draining

    @property
    def num_queued(self) -> int:
        """Requests not yet admitted."""
        return len(self._queued)

    @property
    def num_running(self) -> int:
        """Requests admitted and not yet ended."""
        return len(self._submitted) - len(self._queued)

    def ahead_of(self, request_id: str) -> tuple[int, int] | None:
        """How many queued requests, and how many of their prompt tokens, go before a queued one; None where it is
        not queued."""
        with self._wake:
            request = self._queued.get(request_id)
            if request is None:
                return None
            before, is_earlier = [], True
            for other in self._queued.values():
                if other is request:
                    is_earlier = False
                elif other.priority < request.priority or (is_earlier and other.priority == request.priority):
                    before.append(len(other.prompt))
            return len(before), sum(before)

    def check_turn(self) -> None:
        """Refuse what could not be queued now, whatever it is.

        Raises:
            Overloaded, Draining, EngineDead: not now.
        """
        if not self.is_alive:
            raise EngineDead("the engine has stopped; restart the server")
        if self._draining:
            raise Draining("the server is shutting down")
        if len(self._queued) >= self.engine.config.max_waiting:
            raise Overloaded(f"{len(self._queued)} requests are waiting; try again later")

    def submit(self, request: GenerationRequest) -> None:
        """Hand a request over; its place in the queue is reserved before this returns.

        Args:
            request: one that ``engine.check`` let pass; where it did not, the request ends with Failed.

        Raises:
            Overloaded, Draining, EngineDead: not now.
        """
        config, tokens = self.engine.config, len(request.prompt)
        with self._wake:
            self.check_turn()
            queued = sum(len(waiting.prompt) for waiting in self._queued.values())
            if queued and queued + tokens > (config.max_waiting_tokens or 0):
                raise Overloaded(f"{queued:,} prompt tokens are waiting; try again later")
            if request.request_id in self._submitted:
                raise Overloaded(f"request id {request.request_id} is still running")
            self._queued[request.request_id] = request
            self._submitted.add(request.request_id)
            self._inbox.append(request)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Cancel a request; it ends with Failed(Aborted) unless it has ended already."""
        with self._wake:
            if request_id in self._submitted:
                self._inbox.append(request_id)
                self._wake.notify()

    def call(self, operation: Operation) -> Future[Any]:
        """Run a session operation between steps, as often as it asks for.

        Raises:
            EngineDead: the loop has ended.
        """
        future: Future[Any] = Future()
        with self._wake:
            if not self.is_alive or self._stopping:
                raise EngineDead("the engine has stopped; restart the server")
            self._inbox.append((operation, future))
            self._wake.notify()
        return future

    def drain(self) -> None:
        """Take no new requests; those submitted run to their end."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def stop(self, timeout: float = 30.0) -> None:
        """End the loop after its current step; whatever is unfinished fails with Draining. Then sessions are written
        out, which takes the time it takes; ``timeout`` seconds are for the step."""
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
            if self._is_saving:
                self._thread.join()

    # -- the engine thread ---------------------------------------------------------------------------------

    def _main(self) -> None:
        error: PaceError = Draining("the server is shutting down")
        try:
            while not self._stopping:
                self._take_inbox()
                if self.engine.has_work or self.engine.has_news or self.engine.has_expired:
                    self._emit(self.engine.step())
        except BaseException as failure:
            logger.critical("the engine loop ended", exc_info=failure)
            self._error, error = failure, EngineDead("the engine failed; the server's log has the details")
        finally:
            with self.engine.faults.survived("shutdown"):
                self._end_all(error)
            self._is_saving = True
            with self.engine.faults.survived("shutdown"):
                self.engine.close()
            self._is_saving = False

    def _take_inbox(self) -> None:
        with self._wake:
            if not (self._inbox or self.engine.has_work or self.engine.has_news or self._stopping):
                self._wake.wait(_IDLE_BEAT)
            self.heartbeat = time.monotonic()
            items = list(self._inbox)
            self._inbox.clear()
        for item in items:
            if isinstance(item, tuple):
                self.engine.call(*item)
            elif isinstance(item, str):
                self._abort(item)
            else:
                self._add(item)

    def _add(self, request: GenerationRequest) -> None:
        try:
            self.engine.add(request)
        except PaceError as error:
            self._emit([(request.request_id, Failed(error))])
        except Exception as error:
            self.engine.faults.note("inbox", error)
            refused = EngineError(f"the request could not be queued: {reason(error)}")
            self._emit([(request.request_id, Failed(refused))])

    def _abort(self, request_id: str) -> None:
        """Cancel a request; nothing where it has ended or its commit can no longer be taken back."""
        try:
            has_ended = self.engine.abort(request_id)
        except Exception as error:
            self.engine.faults.note("inbox", error)
            has_ended = request_id not in self.engine.requests
        if has_ended:
            self._emit([(request_id, Failed(Aborted("the request was cancelled")))])

    def _emit(self, events: list[tuple[str, Event]]) -> None:
        """Hand events over. Where that fails, their requests end: an answer with a hole in it would be a wrong one."""
        if not events:
            return
        self._note(events)
        try:
            self._deliver(events)
            return
        except Exception as error:
            self.engine.faults.note("delivery", error)
        lost = EngineError("an event of this request could not be delivered")
        for request_id in dict.fromkeys(request_id for request_id, _ in events):
            with self.engine.faults.survived("delivery"):
                self.engine.abort(request_id)
                failed: list[tuple[str, Event]] = [(request_id, Failed(lost))]
                self._note(failed)
                self._deliver(failed)

    def _note(self, events: list[tuple[str, Event]]) -> None:
        with self._wake:
            for request_id, event in events:
                if isinstance(event, Admitted | Finished | Failed):
                    self._queued.pop(request_id, None)
                if isinstance(event, Finished | Failed):
                    self._submitted.discard(request_id)

    def _end_all(self, error: PaceError) -> None:
        """Nobody is left waiting in silence."""
        with self._wake:
            left = list(self._submitted)
            calls = [item for item in self._inbox if isinstance(item, tuple)]
            self._inbox.clear()
        for request_id in left:
            with self.engine.faults.survived("shutdown"):
                self.engine.abort(request_id)
        for operation, future in calls:
            self.engine.call(operation, future)
        self.engine.end_calls(error)
        self._emit([(request_id, Failed(error)) for request_id in left])
