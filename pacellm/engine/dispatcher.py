"""Which step runs next, and what is told of requests that begin or are refused on the way."""

from __future__ import annotations

from pacellm.engine.queues import RequestQueues
from pacellm.engine.recovery import Recovery
from pacellm.engine.request_state import Outbox, Requests
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.step import Step
from pacellm.errors import RequestError
from pacellm.sessions.claims import DirectoryClaims
from pacellm.sessions.worker import Worker
from pacellm.types import Admitted

_WAIT = 0.002  # seconds that a step waits for the worker where nothing else can run


class Dispatcher:
    """Asks the scheduler, and tells requests what it decided.

    Args:
        scheduler, queues: who decides, and where requests stand.
        claims: refuse requests whose sessions the disk does not give.
        worker: waited for where nothing can run.
        requests, outbox, recovery: who is told.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        queues: RequestQueues,
        claims: DirectoryClaims,
        worker: Worker,
        requests: Requests,
        outbox: Outbox,
        recovery: Recovery,
    ) -> None:
        self._scheduler, self._queues, self._claims, self._worker = scheduler, queues, claims, worker
        self._requests, self._outbox, self._recovery = requests, outbox, recovery

    def next_step(self, ahead: Step | None) -> Step | None:
        """The step to run; None where nothing can.

        Args:
            ahead: a step that was launched before its turn; nothing else is scheduled then.
        """
        preemptions = self._scheduler.preemptions
        step = ahead or self._schedule()
        has_refused = self._fail_refused()
        for sequence in self._queues.take_admitted():
            self._outbox.put((sequence.id, Admitted(sequence.session_status, sequence.cached, sequence.kinship)))
        if step is None and self._worker.num_open:
            self._worker.wait(_WAIT)
        elif step is None and not has_refused and self._scheduler.preemptions == preemptions:
            self._fail_stuck()  # else there is room now for those behind
        return step

    def _schedule(self) -> Step | None:
        try:
            return self._scheduler.schedule()
        except Exception as error:
            considered = self._scheduler.admission.considered
            if considered is None:
                raise
            self._recovery.admission_failed(considered, error)
            return None

    def _fail_refused(self) -> bool:
        refused = [*self._claims.take_refused(), *self._queues.take_refused()]
        events = [self._recovery.fail(sequence, error) for sequence, error in refused if sequence.id in self._requests]
        self._outbox.put(*events)
        return bool(events)

    def _fail_stuck(self) -> None:
        """Nothing runs and something waits: what waits first can never be admitted."""
        if not self._queues.running and self._queues.waiting:
            error = RequestError("this request does not fit in KV memory", param="messages")
            self._outbox.put(self._recovery.fail(self._queues.waiting[0], error))
