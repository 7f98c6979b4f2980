"""What an engine does when something fails: one request pays for it, the others go on."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import torch

from pacellm.engine.integrity import check_integrity
from pacellm.engine.request_state import Live
from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Step
from pacellm.errors import EngineError, PaceError, SessionDeleted, reason
from pacellm.kv.blocks import KVTable
from pacellm.run.runner import StepFailed
from pacellm.sessions.session import Key
from pacellm.types import Event, Failed

if TYPE_CHECKING:
    from pacellm.engine.engine import Engine

logger = logging.getLogger("pacellm.engine")


class Recovery:
    """Ends requests of an engine that failed, so that nothing of them stays behind.

    Args:
        engine: whose requests these are.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def step_failed(self, step: Step, error: StepFailed) -> tuple[str, Event]:
        """Fail the sequence that a step failed on, or its largest; the others start again."""
        engine = self._engine
        blamed = error.sequence or max(step.work, key=lambda work: work.count).sequence
        logger.error("step failed on request %s: %s", blamed.id, error, exc_info=error.__cause__)
        for work in reversed(step.work):
            if work.sequence is not blamed:
                engine.scheduler.preempt(work.sequence)
        failed = self.fail(blamed, EngineError(f"the model failed on this request: {error}"))
        gc.collect()
        if engine.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return failed

    def admission_failed(self, sequence: Sequence, error: Exception) -> None:
        """Have a request refused that could not be admitted, and let go what it had got of its session."""
        engine = self._engine
        engine.faults.note("admission", error)
        engine.scheduler.room.run_copies()  # those of others, before their blocks may be used otherwise
        self._let_go(sequence.request.session)
        refused = EngineError(f"the request could not be admitted: {reason(error)}")
        engine.scheduler.refused.append((sequence, refused))

    def survive(self, error: Exception) -> None:
        """End every request after a failure that belongs to none; those whose commit is on its way to disk go on.

        Raises:
            IntegrityError: memory does not add up.
        """
        engine = self._engine
        engine.faults.note("step", error)
        engine.scheduler.room.take_copies()
        engine.scheduler.admitted = []
        for live in list(engine.live.values()):
            if not (live.index or live.is_recorded):
                engine.late.append(self._give_up(live, EngineError(f"the engine failed: {reason(error)}")))
                self._let_go(live.sequence.request.session)
        check_integrity(engine)

    def _give_up(self, live: Live, error: PaceError) -> tuple[str, Event]:
        """As :meth:`fail`, whatever that comes to."""
        with self._engine.faults.survived("step"):
            return self.fail(live.sequence, error)
        self._engine.live.pop(live.name, None)
        return live.name, Failed(error)

    def _let_go(self, key: Key | None) -> None:
        """A session that no request works on is not busy."""
        session = None if key is None else self._engine.sessions.get(key)
        scheduler = self._engine.scheduler
        if session is not None and all(
            sequence.session is not session for sequence in [*scheduler.running, *scheduler.finishing]
        ):
            session.busy = False

    def fail(self, sequence: Sequence, error: PaceError) -> tuple[str, Event]:
        """End a request with an error; a choice takes its whole request with it."""
        engine = self._engine
        live = engine.live.get(sequence.id)
        name = live.name if live is not None else sequence.id
        first = engine.live.get(name)
        self._scrub(sequence)
        if first is not None and first.choices:
            self.take_out(first)
        else:
            engine.scheduler.remove(sequence)
            engine.live.pop(sequence.id, None)
        engine.stats.failed += 1
        return name, Failed(error)

    def _scrub(self, sequence: Sequence) -> None:
        engine = self._engine
        engine.scheduler.progress.forget_request(sequence.id)
        # blocks that others hold were whole before this request
        owned = [block for block in sequence.table.blocks if engine.allocator.references(block) == 1]
        engine.runner.scrub(KVTable(owned))

    def take_out(self, live: Live, *, keep: bool = False) -> None:
        """Remove a request with all its choices; with ``keep`` its prefill progress stays as idle cache."""
        for choice in [*live.choices[1:], live]:
            self._engine.live.pop(choice.sequence.id, None)
            self._engine.scheduler.remove(choice.sequence, keep=keep)

    def end_requests_of(self, key: Key) -> None:
        """The session is being deleted: whatever waits for it or works on it ends with an error."""
        for live in list(self._engine.live.values()):
            if live.sequence.request.session == key and not (live.is_recorded or live.index):
                error = SessionDeleted("the session was deleted while this request was in progress")
                self._engine.late.append(self.fail(live.sequence, error))
