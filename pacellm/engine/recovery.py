"""What an engine does when something fails: one request pays for it, the others go on."""

from __future__ import annotations

import gc
import logging

import torch

from pacellm.engine.cache_manager import CacheManager
from pacellm.engine.integrity import IntegrityCheck
from pacellm.engine.queues import RequestQueues
from pacellm.engine.request_state import Outbox, Requests, RequestState
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.sequence import Sequence
from pacellm.engine.stats import EngineStats
from pacellm.engine.step import Step
from pacellm.errors import EngineError, PaceError, SessionDeleted, reason
from pacellm.faults import Faults
from pacellm.kv.blocks import BlockAllocator, KVTable
from pacellm.kv.prefix_cache import PrefixCache
from pacellm.run.runner import Runner, StepFailed
from pacellm.sessions.session import Key
from pacellm.sessions.store import SessionStore
from pacellm.types import Event, Failed

logger = logging.getLogger("pacellm.engine")


class Recovery:
    """Ends requests, so that nothing of them stays behind.

    Args:
        requests, outbox: whose end is told there.
        queues, scheduler, sessions: what they stand in and work on.
        allocator, prefix_cache, cache, runner: the memory that they leave.
        integrity: checks it after a failure that belongs to none.
        stats, faults: where failures are counted.
    """

    def __init__(
        self,
        requests: Requests,
        outbox: Outbox,
        queues: RequestQueues,
        scheduler: Scheduler,
        sessions: SessionStore,
        allocator: BlockAllocator,
        prefix_cache: PrefixCache,
        cache: CacheManager,
        runner: Runner,
        integrity: IntegrityCheck,
        stats: EngineStats,
        faults: Faults,
    ) -> None:
        self._requests, self._outbox, self._queues, self._scheduler = requests, outbox, queues, scheduler
        self._sessions, self._allocator, self._prefix_cache, self._cache = sessions, allocator, prefix_cache, cache
        self._runner, self._integrity, self._stats, self._faults = runner, integrity, stats, faults

    # -- one request ---------------------------------------------------------------------------------------

    def fail(self, sequence: Sequence, error: PaceError) -> tuple[str, Event]:
        """End a request with an error; a choice takes its whole request with it."""
        state = self._requests.get(sequence.id)
        request_id = state.request_id if state is not None else sequence.id
        first = self._requests.get(request_id)
        self._scrub(sequence)
        if first is not None and first.choices:
            self.take_out(first)
        else:
            self._scheduler.remove(sequence)
            self._requests.pop(sequence.id, None)
        self._stats.failed += 1
        return request_id, Failed(error)

    def _scrub(self, sequence: Sequence) -> None:
        self._prefix_cache.forget_request(sequence.id)
        # blocks that others hold were whole before this request
        owned = [block for block in sequence.table.blocks if self._allocator.references(block) == 1]
        self._runner.scrub(KVTable(owned))

    def take_out(self, state: RequestState, *, keep: bool = False) -> None:
        """Remove a request with all its choices; with ``keep`` what was computed of its prompt stays as a cached
        prefix."""
        for choice in [*state.choices[1:], state]:
            self._requests.pop(choice.sequence.id, None)
            self._scheduler.remove(choice.sequence, keep=keep)

    def end_requests_of(self, key: Key) -> None:
        """The session is being deleted: whatever waits for it or works on it ends with an error."""
        for state in list(self._requests.values()):
            if state.sequence.request.session == key and not (state.is_recorded or state.index):
                error = SessionDeleted("the session was deleted while this request was in progress")
                self._outbox.put(self.fail(state.sequence, error))

    # -- one step ------------------------------------------------------------------------------------------

    def step_failed(self, step: Step, error: StepFailed) -> None:
        """Fail the sequence that a step failed on, or its largest; the others start again."""
        blamed = error.sequence or max(step.work, key=lambda work: work.count).sequence
        logger.error("step failed on request %s: %s", blamed.id, error, exc_info=error.__cause__)
        for work in reversed(step.work):
            if work.sequence is not blamed:
                self._scheduler.preempt(work.sequence)
        self._outbox.put(self.fail(blamed, EngineError(f"the model failed on this request: {error}")))
        gc.collect()
        if self._runner.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def start_again(self, step: Step) -> None:
        """Those of a failed step ahead that still run feed their tokens anew, from their sessions' states."""
        for work in reversed(step.work):
            if work.sequence.is_running:
                self._scheduler.preempt(work.sequence)

    def admission_failed(self, sequence: Sequence, error: Exception) -> None:
        """Have a request refused that could not be admitted, and let go what it had got of its session."""
        self._faults.note("admission", error)
        self._cache.run_copies()  # those of others, before their blocks may be used otherwise
        self._let_go(sequence.request.session)
        self._queues.refused.append((sequence, EngineError(f"the request could not be admitted: {reason(error)}")))

    # -- the engine ----------------------------------------------------------------------------------------

    def survive(self, error: Exception) -> None:
        """End every request after a failure that belongs to none; those whose commit is on its way to disk go on.

        Raises:
            IntegrityError: memory does not add up.
        """
        self._faults.note("step", error)
        self._cache.take_copies()
        self._queues.take_admitted()
        for state in list(self._requests.values()):
            if not (state.index or state.is_recorded):
                self._outbox.put(self._give_up(state, EngineError(f"the engine failed: {reason(error)}")))
                self._let_go(state.sequence.request.session)
        self._integrity.check()

    def _give_up(self, state: RequestState, error: PaceError) -> tuple[str, Event]:
        """As :meth:`fail`, whatever that comes to."""
        with self._faults.survived("step"):
            return self.fail(state.sequence, error)
        self._requests.pop(state.request_id, None)
        return state.request_id, Failed(error)

    def _let_go(self, key: Key | None) -> None:
        """A session that no request works on is not busy."""
        session, working = self._sessions.get(key), [*self._queues.running, *self._queues.finishing]
        if session is not None and all(sequence.session is not session for sequence in working):
            session.busy = False
