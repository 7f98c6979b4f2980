"""What runs next, and on which memory. No torch.

A step is one token of every decoding sequence, then chunks of prompts (``chunked_prefill.py``). Where a step decodes,
its prompt tokens are capped, in number and in time, so that streams keep flowing.

Where memory runs out, idle state gives way first, and then the youngest sequence of the lowest priority, which starts
again from its session's state and feeds its own tokens with the same cuts.
"""

from __future__ import annotations

from pacellm.config import EngineConfig
from pacellm.engine.admission import Admission
from pacellm.engine.cache_manager import CacheManager
from pacellm.engine.chunked_prefill import add_chunks
from pacellm.engine.deadlines import Deadlines
from pacellm.engine.pace import Pace
from pacellm.engine.queues import RequestQueues
from pacellm.engine.sequence import Sequence, Status
from pacellm.engine.step import Step, Work
from pacellm.kv.prefix_cache import PrefixCache
from pacellm.recall.recaller import Recaller
from pacellm.sessions.eviction import Eviction
from pacellm.sessions.store import SessionStore


class Scheduler:
    """Decides what each step does, and what becomes of a request's memory when it ends.

    Args:
        config: resolved.
        queues: requests.
        sessions, eviction: what outlives them, and keeps it within budgets.
        cache, prefix_cache: the memory.
        admission: begins waiting requests. deadlines: knows who is late. pace: what steps cost.
        recaller: chooses what is called back of histories beyond their budget; None where there is no budget.
    """

    def __init__(
        self,
        config: EngineConfig,
        queues: RequestQueues,
        sessions: SessionStore,
        eviction: Eviction,
        cache: CacheManager,
        prefix_cache: PrefixCache,
        admission: Admission,
        deadlines: Deadlines,
        pace: Pace,
        recaller: Recaller | None = None,
    ) -> None:
        self._config, self._sessions, self._eviction = config, sessions, eviction
        self.queues, self.waiting, self.running = queues, queues.waiting, queues.running
        self.cache, self.prefix_cache, self.admission = cache, prefix_cache, admission
        self.deadlines, self.pace, self._recaller = deadlines, pace, recaller
        self.preemptions = 0

    # -- the next step -------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None where nothing can run."""
        self.admission.admit()
        step = Step()
        budget = self._add_decodes(step, self._config.max_num_batched_tokens)
        decodes = bool(step.work)
        if decodes:
            budget = min(budget, self._config.max_num_mixed_tokens)
        prompts = [sequence for sequence in self.running if not sequence.is_decoding]
        if self._recaller is not None:
            budget -= self._add_questions(step, self._recaller)
            prompts = self._looking(prompts, step)
        seconds = self.pace.seconds(decodes=decodes, several=len(prompts) > 1)
        add_chunks(step, prompts, budget, seconds, self.pace, self.deadlines.is_late)
        step.copies = self.cache.take_copies()
        return step if step.work else None

    def _add_decodes(self, step: Step, budget: int) -> int:
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            sequence.outgrow()
            if budget and sequence.status is Status.RUNNING and self._grow(sequence, step, sequence.position + 1):
                watched = () if self._recaller is None else self._recaller.hits.layers(sequence)
                step.work.append(Work(sequence, 1, watched=watched))
                budget -= 1
        return budget

    def _looking(self, prompts: list[Sequence], step: Step) -> list[Sequence]:
        """Those of ``prompts`` that can be gone on with: what their next tokens see is in place."""
        found = []
        for sequence in prompts:
            is_next = sequence.status is Status.RUNNING and not sequence.is_asking
            if is_next and self._grow(sequence, step, sequence.horizon):
                found.append(sequence)
        return [sequence for sequence in found if sequence.status is Status.RUNNING]

    def _add_questions(self, step: Step, recaller: Recaller) -> int:
        """Choose what is called back, where it is time to, or have the step ask; the tokens that ask."""
        asked = 0
        for sequence in [sequence for sequence in self.running if sequence.is_asking]:
            assert sequence.question is not None
            if not self._grow(sequence, step, sequence.question.stop):
                continue
            if sequence.question and recaller.looks_at is not None:
                step.work.append(Work(sequence, len(sequence.question), asks=recaller.looks_at))
                asked += len(sequence.question)
            else:
                recaller.choose(sequence)
        return asked

    def _grow(self, sequence: Sequence, step: Step, until: int) -> bool:
        """Room for the sequence's tokens before ``until``, and what they see in place, at the price of idle state and
        then of the youngest sequence."""
        while not self.cache.fits(sequence, until):
            if self.cache.is_draining:
                return False  # its turn comes when the worker has freed them; the others go on
            victim = self._least_urgent(step)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def _least_urgent(self, step: Step) -> Sequence:
        """The youngest of the lowest priority, of those that the step does not hold yet."""
        members = [work.sequence for work in step.work]
        candidates = [other for other in reversed(self.running) if other not in members]
        return max(candidates, key=lambda other: other.request.priority)

    # -- requests come and go ------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a checked request."""
        self.queues.enqueue(sequence)

    def keep(self, sequence: Sequence) -> None:
        """A prompt chunk was fed: its state may serve others, or the same request sent again."""
        self.prefix_cache.keep(sequence, self.queues.seats)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's working copy away; it waits, first in line, to start again."""
        self.running.remove(sequence)
        self._close_session(sequence)
        self.cache.free(sequence)
        sequence.status = Status.WAITING
        sequence.work, sequence.cursor = [], 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def hold(self, sequence: Sequence) -> None:
        """A request is complete, but something else must end before its session may take over."""
        self.running.remove(sequence)
        self.queues.finishing.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A request is complete: its session takes over the working copy, or it is freed."""
        finishing = self.queues.finishing
        (finishing if sequence in finishing else self.running).remove(sequence)
        session = sequence.session
        if session is not None and sequence.request.commit and not session.deleted:
            sequence.session_status = self._sessions.commit(session, sequence)
            self.prefix_cache.forget_session(session.key, made=False)
        self._close_session(sequence)
        self.cache.free(sequence)
        sequence.status = Status.ENDED
        self.deadlines.answered(sequence)
        self._eviction.trim()
        self.cache.free_rows(self._config.max_num_seqs - self.queues.seats)

    def remove(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Take a request out wherever it is and free what it holds; its session stays as it was. With ``keep`` what was
        computed of its prompt stays as a cached prefix."""
        self.deadlines.given_up(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            if keep:
                self.prefix_cache.take_over(sequence)
            self._close_session(sequence)
        elif sequence in self.queues.finishing:
            self.queues.finishing.remove(sequence)
            self._close_session(sequence, failed=True)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            if not sequence.is_branch:
                self._unwant(sequence)
        self.cache.free(sequence)
        sequence.status = Status.ENDED

    def _unwant(self, sequence: Sequence) -> None:
        """A request that waited is gone; what was made for it alone goes too."""
        session = self._sessions.get(sequence.request.session)
        if session is not None and not session.busy:
            session.wanted = False
            self._sessions.close(session, keep=False)

    def _close_session(self, sequence: Sequence, *, failed: bool = False) -> None:
        session = sequence.session
        sequence.session = None
        if session is not None:
            ended = sequence.request.commit and sequence.finish_reason is not None and not failed
            self._sessions.close(session, keep=ended)
