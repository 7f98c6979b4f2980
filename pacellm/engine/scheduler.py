"""What runs next, and on which memory. No torch.

A step is one token of every decoding sequence, then prompt chunks: the shortest remaining prompt first, each at
most an equal share of what is left of the budget, so that a long prompt never holds up a short one. Where a
step decodes, its prompt tokens are capped, so that streams keep flowing.

Memory: a request is admitted when its prompt and one more block per running sequence fit. Room is made by
evicting idle sessions, least recently used first, and then by preempting the youngest sequence of the lowest priority,
which starts again from its session's state and feeds its own tokens with the same cuts.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from dataclasses import dataclass, field

from pacellm.config import EngineConfig
from pacellm.engine.kv import BLOCK, BlockAllocator, KVTable, OutOfBlocks, blocks_for
from pacellm.engine.sequence import Sequence, Status, Turn, common_prefix
from pacellm.engine.sessions import Session, SessionStore
from pacellm.errors import ContextLengthExceeded, RequestError
from pacellm.memory.pool import BankPool

_MAX_SCORED = 256  # rows of logits that one request may ask of a step


@dataclass(frozen=True)
class Work:
    """``count`` tokens of a sequence's current turn, from its cursor."""

    sequence: Sequence
    count: int


@dataclass(frozen=True)
class Copy:
    """``length`` tokens of KV to copy between slots before the step."""

    source: int
    target: int
    length: int


@dataclass
class Step:
    """What one forward pass does."""

    work: list[Work] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Rows of the packed step."""
        return sum(item.count for item in self.work)


class Scheduler:
    """Queues, admission, memory and preemption.

    Args:
        config: resolved.
        allocator, sessions, pool: the memory; pool is None without PA.
    """

    def __init__(
        self, config: EngineConfig, allocator: BlockAllocator, sessions: SessionStore, pool: BankPool | None
    ) -> None:
        self.config, self.allocator, self.sessions, self.pool = config, allocator, sessions, pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.admitted: list[Sequence] = []  # since the last step
        self.preemptions = 0
        self._copies: list[Copy] = []

    # -- requests come and go ------------------------------------------------------------------------------

    def check(self, prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse what can never run.

        Raises:
            RequestError: no prompt, a prompt (with max_tokens) longer than the context.
        """
        limit = self.config.max_model_len or 0
        if prompt_tokens < 1:
            raise RequestError("the prompt has no tokens", param="messages")
        room = limit - prompt_tokens
        if room < (0 if max_tokens == 0 else 1):
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens:,} tokens; this model's context is {limit:,} tokens, "
                "prompt and answer together",
                param="messages",
            )
        if max_tokens is not None and max_tokens > room:
            raise ContextLengthExceeded(
                f"max_tokens {max_tokens:,} with a prompt of {prompt_tokens:,} tokens is over this model's context "
                f"of {limit:,} tokens; at most {room:,} are left",
                param="max_tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a checked request, behind those of its priority and those of its own session."""
        self._enqueue(sequence, len(self.waiting))

    def _enqueue(self, sequence: Sequence, place: int) -> None:
        own = sequence.request
        while place:
            before = self.waiting[place - 1].request
            if before.priority <= own.priority or (own.session is not None and before.session == own.session):
                break
            place -= 1
        self.waiting.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a request out wherever it is and free what it holds; its session stays as it was."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._close_session(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)
        sequence.status = Status.ENDED

    def finish(self, sequence: Sequence) -> None:
        """A request is complete: its session takes over the working copy, or it is freed."""
        self.running.remove(sequence)
        session = self._session(sequence)
        if session is not None and sequence.request.commit:
            sequence.session_status = self.sessions.commit(session, sequence)
        self._close_session(sequence)
        self._free(sequence)
        sequence.status = Status.ENDED
        self.sessions.trim()

    # -- the next step -------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None where nothing can run."""
        self._admit()
        step = Step()
        budget = self._add_decodes(step, self.config.max_num_batched_tokens)
        if step.work:
            budget = min(budget, self.config.max_num_mixed_tokens)
        self._add_prompts(step, budget)
        step.copies, self._copies = self._copies, []
        return step if step.work else None

    def _add_decodes(self, step: Step, budget: int) -> int:
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            if budget and sequence.status is Status.RUNNING and self._grow(sequence, step):
                step.work.append(Work(sequence, 1))
                budget -= 1
        return budget

    def _add_prompts(self, step: Step, budget: int) -> None:
        prefilling = sorted(
            (sequence for sequence in self.running if not sequence.is_decoding), key=lambda sequence: sequence.pending
        )
        for number, sequence in enumerate(prefilling):
            share = -(-budget // (len(prefilling) - number))
            if sequence.request.sampling.prompt_logprobs is not None:
                share = min(share, _MAX_SCORED)
            count = min(share, len(sequence.turn.ids) - sequence.cursor)
            if count:
                step.work.append(Work(sequence, count))
                budget -= count

    # -- memory --------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if len(self.running) >= self.config.max_num_seqs:
                return
            session = self._session(sequence)
            if session is not None and (session.busy or self._is_behind(sequence)):
                continue
            if not self._try_admit(sequence, session):
                return

    def _is_behind(self, sequence: Sequence) -> bool:
        """An earlier request of the same session is still waiting."""
        for other in self.waiting:
            if other is sequence:
                return False
            if other.request.session == sequence.request.session:
                return True
        return False

    def _try_admit(self, sequence: Sequence, session: Session | None) -> bool:
        """Give a waiting sequence its working copy; False where there is no room yet."""
        work = self._plan(sequence, session)
        resident = session is not None and session.is_resident
        shared = work[-1].start // BLOCK if resident else 0
        needed = blocks_for(max(turn.end for turn in work)) - shared
        if session is not None:
            session.busy = True  # from here on its state is not evictable
        if not self._make_room(needed + len(self.running)) or not self._make_row(sequence):
            if session is not None:
                session.busy = False
            if session is None or not resident or self.running:
                return False
            # nobody else holds anything: its own old state is in the way, and its log brings that back
            self.sessions.evict(session)
            return self._try_admit(sequence, session)
        if sequence.request.session is not None and session is None:
            session = self.sessions.open(sequence.request.session)
            session.busy = True
        elif session is not None:
            self.sessions.open(session.key)
        self._describe(sequence, session, work)
        sequence.table = self._new_table(session, work[-1].start if resident else 0, needed)
        self._new_banks(sequence, session if resident else None, session)
        sequence.begin(work, time.monotonic())
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.admitted.append(sequence)
        return True

    def _plan(self, sequence: Sequence, session: Session | None) -> list[Turn]:
        """The turns to feed: the log where the session's state is gone, and the request's own."""
        start = 0
        if session is not None:
            start = min(common_prefix(sequence.prompt, session.context), len(sequence.prompt) - 1)
        ids = sequence.prompt[start:] + array("i", sequence.generated)
        own = Turn(start, len(sequence.prompt), ids, sequence.request.pa if self.pool is not None else "off")
        if session is None or session.is_resident:
            return [own]
        return [*session.log, own]

    def _describe(self, sequence: Sequence, session: Session | None, work: list[Turn]) -> None:
        sequence.replayed = sum(len(turn.ids) for turn in work[:-1])
        sequence.cached = 0 if sequence.replayed else work[-1].start
        if session is None:
            sequence.session_status = "none"
        elif sequence.replayed:
            sequence.session_status = "replayed"
        elif session.commits:
            sequence.session_status = "resident"
        else:
            sequence.session_status = session.status

    def _new_table(self, session: Session | None, start: int, needed: int) -> KVTable:
        """A table that shares the session's full blocks before ``start`` and owns the rest."""
        kept = start // BLOCK
        source = session.table.blocks if session is not None and session.table is not None else []
        table = KVTable(list(source[:kept]))
        self.allocator.share(table.blocks)
        table.extend(self.allocator.allocate(needed, table.blocks[-1] if table.blocks else None))
        if start % BLOCK:
            self._copies.append(Copy(source[kept] * BLOCK, table.blocks[kept] * BLOCK, start % BLOCK))
        return table

    def _new_banks(self, sequence: Sequence, resident: Session | None, session: Session | None) -> None:
        if self.pool is None:
            return
        sequence.row = self.pool.check_out(resident.row if resident is not None else None)
        if resident is None and session is not None and session.origin is not None:
            for layer, bank in self.pool.banks(sequence.row).items():
                bank.copy_(session.origin[layer])
        sequence.counters_before = self.pool.counters(sequence.row)

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """Room for the sequence's next token, at the price of idle sessions and then of the youngest sequence."""
        while sequence.position >= sequence.table.capacity:
            try:
                sequence.table.extend(self.allocator.allocate(1, sequence.table.blocks[-1]))
            except OutOfBlocks:
                if self.sessions.evict_one():
                    continue
                victim = self._least_urgent(step)
                self.preempt(victim)
                if victim is sequence:
                    return False
        return True

    def _least_urgent(self, step: Step) -> Sequence:
        """The youngest of the lowest priority, of those that the step does not hold yet."""
        candidates = [other for other in reversed(self.running) if other not in _members(step)]
        return max(candidates, key=lambda other: other.request.priority)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's working copy away; it waits, first in line, to start again."""
        self.running.remove(sequence)
        self._close_session(sequence)
        self._free(sequence)
        sequence.status = Status.WAITING
        sequence.work, sequence.cursor = [], 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _make_room(self, blocks: int) -> bool:
        if self.allocator.num_free >= blocks:
            return True
        # a lone request may use the last block
        needed = blocks if self.running else min(blocks, self.allocator.num_blocks)
        if self.allocator.num_free + self.sessions.idle_blocks() < needed:
            return False
        while self.allocator.num_free < needed and self.sessions.evict_one():
            pass
        return self.allocator.num_free >= needed

    def _make_row(self, sequence: Sequence) -> bool:
        if self.pool is None:
            return True
        while not self.pool.num_free and self.sessions.evict_one(needs_row=True):
            pass
        return self.pool.num_free > 0

    def _free(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.table.blocks)
        sequence.table = KVTable()
        if sequence.row is not None and self.pool is not None:
            self.pool.release(sequence.row)
            sequence.row = None

    def _session(self, sequence: Sequence) -> Session | None:
        return None if sequence.request.session is None else self.sessions.get(sequence.request.session)

    def _close_session(self, sequence: Sequence) -> None:
        session = self._session(sequence)
        if session is not None:
            self.sessions.close(session, keep=sequence.request.commit and sequence.finish_reason is not None)


def _members(step: Step) -> list[Sequence]:
    return [work.sequence for work in step.work]
