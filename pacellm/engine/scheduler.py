"""What runs next, and on which memory. No torch.

A step is one token of every decoding sequence, then parts of prompts (``chunking.py``). Where a step decodes, its
prompt tokens are capped, in number and in time, so that streams keep flowing.

Memory: a request is admitted when its prompt and one more block per running sequence fit. Room is made by
evicting idle sessions, least recently used first, and then by preempting the youngest sequence of the lowest priority,
which starts again from its session's state and feeds its own tokens with the same cuts.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Literal

from pacellm.config import EngineConfig
from pacellm.engine.admission import Planner, describe
from pacellm.engine.cache_manager import Room
from pacellm.engine.chunking import add_parts
from pacellm.engine.deadlines import Deadlines
from pacellm.engine.pace import Pace
from pacellm.engine.sequence import Sequence, Status
from pacellm.engine.step import Step, Work
from pacellm.errors import ContextLengthExceeded, PaceError, RequestError
from pacellm.kv.blocks import BLOCK, BlockAllocator, OutOfBlocks, blocks_for
from pacellm.kv.prefix import Entry, PrefixCache
from pacellm.memory.pool import BankPool
from pacellm.sessions.history import bind
from pacellm.sessions.mover import Mover
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore
from pacellm.sessions.turn import Turn


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
        self.finishing: list[Sequence] = []  # complete, but their commit is not yet on disk
        self.mover: Mover | None = None
        self.admitted: list[Sequence] = []  # since the last step
        self.refused: list[tuple[Sequence, PaceError]] = []  # since the last step
        self.considered: Sequence | None = None  # the request that is being admitted
        self.preemptions = 0
        self.progress = PrefixCache(allocator, pool, segment=config.bank.segment, max_seqs=config.max_num_seqs)
        self.pace, self.clock = Pace(), time.monotonic
        self.room = Room(allocator, sessions, pool, self.progress)
        self.planner = Planner(
            self.progress, preset=config.bank.preset if config.pa else None, density=config.ce_density
        )
        self.deadlines = Deadlines(self)

    # -- requests come and go ------------------------------------------------------------------------------

    def check(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """Refuse what can never run. Returns how many tokens may be generated.

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
        return room if max_tokens is None else max_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a checked request, behind those of its priority, those of its own session and the choices of running
        requests, which hold on to their memory until their choices end."""
        self._enqueue(sequence, len(self.waiting))

    def _enqueue(self, sequence: Sequence, place: int) -> None:
        own = sequence.request
        while place:
            other = self.waiting[place - 1]
            before = other.request
            is_own = own.session is not None and before.session == own.session
            if other.is_branch or is_own or before.priority <= own.priority:
                break
            place -= 1
        self.waiting.insert(place, sequence)

    def remove(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Take a request out wherever it is and free what it holds; its session stays as it was. With ``keep`` its
        prefill progress stays as idle cache."""
        self.deadlines.given_up(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            if keep:
                self.progress.take_over(sequence)
            self._close_session(sequence)
        elif sequence in self.finishing:
            self.finishing.remove(sequence)
            self._close_session(sequence, failed=True)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            if not sequence.is_branch:
                self._unwant(sequence)
        self.room.free(sequence)
        sequence.status = Status.ENDED

    def keep(self, sequence: Sequence) -> None:
        """A prompt chunk was fed: its state may serve others, or the same request sent again."""
        self.progress.keep(sequence, self.seats)

    def hold(self, sequence: Sequence) -> None:
        """A request is complete, but something else must end before its session may take over."""
        self.running.remove(sequence)
        self.finishing.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A request is complete: its session takes over the working copy, or it is freed."""
        (self.finishing if sequence in self.finishing else self.running).remove(sequence)
        session = sequence.session
        if session is not None and sequence.request.commit and not session.deleted:
            sequence.session_status = self.sessions.commit(session, sequence)
            self.progress.forget_session(session.key, made=False)
        self._close_session(sequence)
        self.room.free(sequence)
        sequence.status = Status.ENDED
        self.deadlines.answered(sequence)
        self.sessions.trim()
        self._free_working_rows()

    def _free_working_rows(self) -> None:
        """Kept progress never takes the rows that running requests may need."""
        working = self.seats
        while self.pool is not None and self.pool.num_free < self.config.max_num_seqs - working:
            if not self.progress.evict_one():
                return

    # -- the next step -------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None where nothing can run."""
        self._admit()
        self.considered = None
        step = Step()
        budget = self._add_decodes(step, self.config.max_num_batched_tokens)
        decodes = bool(step.work)
        if decodes:
            budget = min(budget, self.config.max_num_mixed_tokens)
        prompts = [sequence for sequence in self.running if not sequence.is_decoding]
        seconds = self.pace.seconds(decodes=decodes, several=len(prompts) > 1)
        add_parts(step, prompts, budget, seconds, self.pace, self.deadlines.is_late)
        step.copies = self.room.take_copies()
        return step if step.work else None

    def _add_decodes(self, step: Step, budget: int) -> int:
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            if budget and sequence.status is Status.RUNNING and self._grow(sequence, step):
                step.work.append(Work(sequence, 1))
                budget -= 1
        return budget

    # -- memory --------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            self.considered = sequence
            if self.seats + sequence.request.n > self.config.max_num_seqs:
                return
            session = self.session_of(sequence)
            if sequence.is_branch:
                if not self._try_admit(sequence, session):
                    return
                continue
            if sequence.request.session is not None and self._is_behind(sequence):
                continue
            if session is not None and (session.busy or session.moving):
                continue
            if self.mover is not None and not self.mover.openings.is_open(sequence):
                continue
            if sequence.request.append is not None and not self._is_bound(sequence, session):
                continue
            if self.mover is not None:
                is_stored = session is not None and self.mover.stored_tokens(session) is not None
                if session is not None and is_stored and not self.planner.has_own_progress(sequence, session):
                    match self._bring_back(sequence, session):
                        case "coming":
                            continue
                        case "later":
                            return
            if (error := self.deadlines.missed(sequence, session)) is not None:
                self.refused.append((sequence, error))
                continue
            if not self._try_admit(sequence, session):
                return

    def _is_bound(self, sequence: Sequence, session: Session | None) -> bool:
        """The prompt is whole: a request that appends has got its session's history. Notes it as refused where there
        is none."""
        request = sequence.request
        assert request.append is not None
        assert request.session is not None
        try:
            bind(sequence, session, was_lost=self.sessions.was_lost(request.session))
            sequence.max_tokens = self.check(len(sequence.prompt), request.sampling.max_tokens)
        except RequestError as error:
            if error.param == "messages":
                error.param = request.append.param
            self.refused.append((sequence, error))
            return False
        return True

    @property
    def seats(self) -> int:
        """Working rows that are used or promised: those of choices that go on after the prompt are."""
        promised = sum(sequence.num_branches for sequence in self.running)
        return len(self.running) + len(self.finishing) + promised

    def branch(self, parent: Sequence, sequence: Sequence) -> bool:
        """Let a choice go on from a copy of its parent's state at the prompt's end. False where there is no room: it is
        queued, first in line, and gets there by feeding the prompt as its parent did."""
        parent.num_branches -= 1
        sequence.prompt, sequence.max_tokens = parent.prompt, parent.max_tokens
        if self.has_room(1) and self.room.make_row():
            turn = parent.turn
            own = Turn(turn.start, turn.prompt_end, turn.ids[: parent.cursor], turn.pa, turn.density)
            used = blocks_for(parent.position)
            sequence.lineage, sequence.cached = parent.lineage, parent.cached
            sequence.table = self.room.new_table(parent.table.blocks, parent.position, used - parent.position // BLOCK)
            self.room.run_copies()
            self.room.new_banks(sequence, parent.row, None)
            sequence.begin([own], self.clock(), index=parent.index)
            sequence.advance(parent.cursor)
            self.running.append(sequence)
            return True
        self.waiting.appendleft(sequence)
        return False

    def _is_behind(self, sequence: Sequence) -> bool:
        """An earlier request of the same session is still waiting."""
        for other in self.waiting:
            if other is sequence:
                return False
            if other.request.session == sequence.request.session and not other.is_branch:
                return True
        return False

    def _bring_back(self, sequence: Sequence, session: Session) -> Literal["coming", "later", "never"]:
        """Start restoring a session's state; ``later`` where there is no room yet, ``never`` where none will come."""
        assert self.mover is not None
        tokens = self.mover.stored_tokens(session) or 0
        own = self.planner.own_turn(sequence, session)
        blocks = blocks_for(tokens) + max(0, blocks_for(own.end) - own.start // BLOCK)
        session.busy = True
        has_room = blocks <= self.allocator.num_blocks and self._make_room(blocks) and self.room.make_row()
        session.busy = False
        if has_room:
            # the worker may be given blocks at once that a copy of this step still reads
            self.room.run_copies()
            self.mover.restore(session)
            return "coming"
        if not self.running and not self.finishing and not self.mover.worker.num_open:
            self.sessions.drop(session)  # nobody else gives way: its log brings it back
            return "never"
        return "later"

    def _unwant(self, sequence: Sequence) -> None:
        """A request that waited is gone; what was made for it alone goes too."""
        session = self.session_of(sequence)
        if session is not None and not session.busy:
            session.wanted = False
            self.sessions.close(session, keep=False)

    def _try_admit(self, sequence: Sequence, session: Session | None) -> bool:
        """Give a waiting sequence its working copy; False where there is no room yet."""
        plan = self.planner.plan(sequence, session)
        work, shared = plan.work, plan.position // BLOCK
        resident = session is not None and session.is_resident
        needed = blocks_for(max(turn.end for turn in work)) - shared
        was_busy = session is not None and session.busy  # by the request that this one is a choice of
        if session is not None:
            session.busy = True  # from here on its state is not evictable
        has_room = self._make_room(needed + len(self.running), keep=plan.entry)
        if not has_room or not self.room.make_row(keep=plan.entry):
            if session is not None:
                session.busy = was_busy
            # a choice may be in its own request's way: the first one waits for it
            if self.running or self._is_moving() or (self.finishing and not sequence.is_branch):
                return False
            if plan.entry is not None:
                self.progress.drop(plan.entry)  # what it saves is in the way
                return self._try_admit(sequence, session)
            if session is None or not resident:
                return False
            # nobody else holds anything: its own old state is in the way, and its log brings that back
            self.sessions.drop(session)
            return self._try_admit(sequence, session)
        if sequence.request.session is not None and session is None:
            session = self.sessions.open(sequence.request.session)
            session.busy = True
        elif session is not None:
            self.sessions.touch(session)
            session.wanted = False
        describe(sequence, session, plan)
        sequence.session = None if sequence.is_branch else session
        sequence.table = self.room.new_table(plan.blocks, plan.position, needed)
        self.room.new_banks(sequence, plan.row, session)
        sequence.lineage = plan.lineage
        sequence.begin(work, self.clock(), index=plan.index, cursor=plan.cursor)
        if plan.entry is not None:
            self.progress.use(plan.entry, sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if not sequence.is_branch:
            self.admitted.append(sequence)
        return True

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """Room for the sequence's next token, at the price of idle sessions and then of the youngest sequence."""
        while sequence.position >= sequence.table.capacity:
            try:
                sequence.table.extend(self.allocator.allocate(1, sequence.table.blocks[-1]))
            except OutOfBlocks:
                if self.progress.evict_one():
                    continue
                if not self.sessions.leaving()[0] and self.sessions.evict_one():
                    continue
                if self.sessions.leaving()[0]:
                    return False  # its turn comes when the worker has freed them; the others go on
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
        self.room.free(sequence)
        sequence.status = Status.WAITING
        sequence.work, sequence.cursor = [], 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def has_room(self, blocks: int) -> bool:
        """``blocks`` are free beside one for every running sequence, or have been made so."""
        return self._make_room(blocks + len(self.running))

    def _make_room(self, blocks: int, keep: Entry | None = None) -> bool:
        return self.room.make_room(blocks, is_alone=not self.running, keep=keep)

    def session_of(self, sequence: Sequence) -> Session | None:
        """The session that it names, where that is known."""
        return None if sequence.request.session is None else self.sessions.get(sequence.request.session)

    def _close_session(self, sequence: Sequence, *, failed: bool = False) -> None:
        session = sequence.session
        sequence.session = None
        if session is not None:
            ended = sequence.request.commit and sequence.finish_reason is not None and not failed
            self.sessions.close(session, keep=ended)

    def _is_moving(self) -> bool:
        return self.mover is not None and self.mover.worker.num_open > 0


def _members(step: Step) -> list[Sequence]:
    return [work.sequence for work in step.work]
