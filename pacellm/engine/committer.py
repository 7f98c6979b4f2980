"""What a step that has run changes: sequences go on, prompts' prefixes are kept, answers grow and end."""

from __future__ import annotations

from pacellm.engine.answer import Answers
from pacellm.engine.cache_manager import CacheManager
from pacellm.engine.integrity import IntegrityCheck
from pacellm.engine.recovery import Recovery
from pacellm.engine.request_state import Outbox
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.sequence import Sequence
from pacellm.engine.stats import EngineStats
from pacellm.engine.step import Work
from pacellm.errors import EngineError, reason
from pacellm.faults import Faults
from pacellm.memory.pool import BankPool
from pacellm.recall.recaller import Recaller
from pacellm.run.ahead import Flight
from pacellm.run.runner import Output
from pacellm.types import Progress


class Committer:
    """Commits steps; what fails there fails one request.

    Args:
        answers: from logits to events, which go to the outbox.
        scheduler, cache: keep what was computed.
        recovery, faults: for what fails.
        stats: where steps and tokens are counted.
        integrity: asked after each step; None where it is not to be.
        recaller: chooses what is called back; None where nothing is.
        pool: of banks; None without PA.
    """

    def __init__(
        self,
        answers: Answers,
        scheduler: Scheduler,
        cache: CacheManager,
        recovery: Recovery,
        outbox: Outbox,
        stats: EngineStats,
        faults: Faults,
        integrity: IntegrityCheck | None,
        recaller: Recaller | None = None,
        pool: BankPool | None = None,
    ) -> None:
        self._answers, self._scheduler, self._cache, self._recovery = answers, scheduler, cache, recovery
        self._outbox, self._stats, self._faults, self._integrity = outbox, stats, faults, integrity
        self._recaller, self._pool = recaller, pool

    def commit(self, flight: Flight) -> None:
        """Take over what a step has given.

        Raises:
            IntegrityError: memory does not add up.
        """
        output = flight.output
        events, failed = self._answers.scores(output)
        self._outbox.put(*events)
        rows = {sequence.id: row for row, sequence in enumerate(output.sampled)}
        self._stats.steps += 1
        for work in flight.step.work:
            sequence = work.sequence
            if not sequence.is_running:
                continue  # it ended meanwhile; a failed choice takes the others along
            try:
                if work.asks is not None:
                    self._choose(sequence, output)
                    continue
                self._measure(work, output)
                self._advance(work)
                if sequence.id in failed:
                    self._outbox.put(self._recovery.fail(sequence, failed[sequence.id]))
                elif sequence.id in rows:
                    self._outbox.put(*self._answers.sample(sequence, output.logits[rows[sequence.id]], flight.chosen))
            except Exception as error:
                self._faults.note("commit", error)
                failure = EngineError(f"the request failed: {reason(error)}")
                self._outbox.put(self._recovery.fail(sequence, failure))
        if self._integrity is not None:
            self._integrity.check()

    def _choose(self, sequence: Sequence, output: Output) -> None:
        """A sequence's question was asked: what is called back for it."""
        assert self._recaller is not None
        self._recaller.choose(sequence, output.asked[sequence.id])

    def _measure(self, work: Work, output: Output) -> None:
        """What a watched token attended to."""
        if work.watched and self._recaller is not None:
            self._recaller.hits.measure(work, output.asked[work.sequence.id])

    def _advance(self, work: Work) -> None:
        """A sequence's tokens were fed."""
        sequence, decoding = work.sequence, work.sequence.is_decoding
        self._stats.prompt_tokens += 0 if decoding else work.count
        is_replaying = len(sequence.work) > 1
        sequence.advance(work.count)
        is_choice = sequence.is_branch and not sequence.generated and not sequence.pending
        if is_choice or (is_replaying and len(sequence.work) == 1):
            self._cache.mark(sequence)
        self._trace(sequence)
        if not decoding:
            self._scheduler.keep(sequence)
            self._outbox.put((sequence.id, Progress(sequence.total_work, sequence.done_work)))

    def _trace(self, sequence: Sequence) -> None:
        """What its token found in the banks, where that is asked for."""
        if sequence.trace is None or self._pool is None or sequence.row is None or sequence.turn.pa == "off":
            return
        sequence.trace.fed(sequence.num_fed, self._pool.counters(sequence.row))
