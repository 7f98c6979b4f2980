"""Requests whose turn it is get their working copies, or are refused. No torch.

A request is admitted when its prompt and one more block per running sequence fit. Room is made by evicting cached
prefixes and idle sessions, least recently used first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from pacellm.config import EngineConfig
from pacellm.engine.admission_plan import AdmissionPlan, AdmissionPlanner, note_findings
from pacellm.engine.cache_manager import CacheManager
from pacellm.engine.deadlines import Deadlines
from pacellm.engine.queues import RequestQueues
from pacellm.engine.sequence import Sequence
from pacellm.engine.validation import limit_of, tokens_to_generate
from pacellm.errors import ContextLengthExceeded, PaceError, RequestError
from pacellm.kv.blocks import blocks_for
from pacellm.kv.prefix_cache import PrefixCache
from pacellm.sessions.history import bind
from pacellm.sessions.mover import Mover
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore
from pacellm.view import BLOCK


class Admission:
    """Begins requests.

    Args:
        config: resolved.
        queues: requests.
        sessions, mover: their sessions, and the tiers below.
        cache, prefix_cache: the memory.
        planner: what is to be fed, and on which state.
        deadlines: who would miss its own.
        clock: seconds.

    Attributes:
        considered: the request that is being admitted.
    """

    def __init__(
        self,
        config: EngineConfig,
        queues: RequestQueues,
        sessions: SessionStore,
        mover: Mover,
        cache: CacheManager,
        prefix_cache: PrefixCache,
        planner: AdmissionPlanner,
        deadlines: Deadlines,
        clock: Callable[[], float],
    ) -> None:
        self._config, self._queues, self._sessions, self._mover = config, queues, sessions, mover
        self._cache, self._prefix_cache, self._deadlines, self._clock = cache, prefix_cache, deadlines, clock
        self.planner = planner
        self.considered: Sequence | None = None

    def admit(self) -> None:
        """Begin waiting requests, in their order, as far as there is room."""
        for sequence in list(self._queues.waiting):
            self.considered = sequence
            if self._queues.seats + sequence.request.n > self._config.max_num_seqs or not self._consider(sequence):
                break
        self.considered = None

    def _consider(self, sequence: Sequence) -> bool:
        """Begin a request, refuse it, or leave it where it is. False where those behind it must wait as well."""
        session = self._sessions.get(sequence.request.session)
        if sequence.is_branch:
            return self._begin_if_fits(sequence, session)
        if not self._is_ready(sequence, session):
            return True
        match self._bring_back(sequence, session):
            case "coming":
                return True
            case "later":
                return False
        if (error := self._deadlines.missed(sequence, session)) is not None:
            self._queues.refused.append((sequence, error))
            return True
        return self._begin_if_fits(sequence, session)

    def _is_ready(self, sequence: Sequence, session: Session | None) -> bool:
        """Its session is free, known and, where the request appends to it, part of its prompt."""
        if sequence.request.session is not None and self._queues.is_behind(sequence):
            return False
        if session is not None and (session.busy or session.moving):
            return False
        if not self._mover.claims.is_settled(sequence):
            return False
        return sequence.request.append is None or self._bind(sequence, session)

    def _bind(self, sequence: Sequence, session: Session | None) -> bool:
        """A request that appends gets its session's history. Notes it as refused where there is none."""
        request = sequence.request
        assert request.append is not None
        assert request.session is not None
        try:
            bind(sequence, session, was_lost=self._sessions.was_lost(request.session))
            length, limit = len(sequence.prompt), limit_of(request, self._config)
            asked = request.sampling.max_tokens
            sequence.max_tokens = tokens_to_generate(length, asked, limit, self._config.longest_answer)
        except RequestError as error:
            if error.param == "messages":
                error.param = request.append.param
            self._queues.refused.append((sequence, error))
            return False
        return True

    def _bring_back(self, sequence: Sequence, session: Session | None) -> Literal["here", "coming", "later"]:
        """Start restoring a session's state where it is needed; ``later`` where there is no room for it yet."""
        tokens = None if session is None else self._mover.stored_tokens(session)
        if session is None or tokens is None or not self.planner.needs_state(sequence, session):
            return "here"
        own = self.planner.own_turn(sequence, session)
        wanted = max(0, blocks_for(own.end) - own.start // BLOCK)
        blocks = blocks_for(tokens) + (wanted if own.budget is None else min(wanted, own.budget.tokens // BLOCK))
        if self._has_room_for_state(session, blocks):
            # the worker may be given blocks at once that a copy of this step still reads
            self._cache.run_copies()
            self._mover.restore(session)
            return "coming"
        if self._queues.running or self._queues.finishing or self._mover.is_busy:
            return "later"
        self._sessions.drop(session)  # nobody else gives way: its log brings it back
        return "here"

    def _has_room_for_state(self, session: Session, blocks: int) -> bool:
        session.busy = True
        has_room = self._cache.has_blocks(blocks) and self._cache.make_room(blocks) and self._cache.make_row()
        session.busy = False
        return has_room

    # -- beginning -----------------------------------------------------------------------------------------

    def _begin_if_fits(self, sequence: Sequence, session: Session | None) -> bool:
        """Give a waiting sequence its working copy; False where there is no room yet."""
        plan = self.planner.plan(sequence, session)
        if not self._has_history_room(sequence, session, plan):
            return False
        needed = _blocks_needed(plan)
        if self._has_room(plan, session, needed):
            self._begin(sequence, session, plan, needed)
            return True
        return self._gives_way(sequence, session, plan) and self._begin_if_fits(sequence, session)

    def _has_room(self, plan: AdmissionPlan, session: Session | None, needed: int) -> bool:
        """There is room for what a plan needs. The session is busy from then on: its state is not evictable."""
        was_busy = session is not None and session.busy  # by the request that this one is a choice of
        if session is not None:
            session.busy = True
        if self._cache.has_room(needed, plan.prefix) and self._cache.make_row(plan.prefix):
            return True
        if session is not None:
            session.busy = was_busy
        return False

    def _has_history_room(self, sequence: Sequence, session: Session | None, plan: AdmissionPlan) -> bool:
        """There is host memory, or room on disk, for what will leave the request's window, beside what running ones
        still add; idle state gives way. Notes it as refused where there never will be."""
        views, histories = self._cache.views, self._mover.histories
        if views is None:
            return True
        wanted = views.token_bytes * max(0, _history_end(plan, sequence) - plan.table.history.tokens)
        if (error := self._cannot_hold(wanted)) is not None:
            self._queues.refused.append((sequence, error))
            return False
        promised = sum(other.promised_history for other in self._queues.running) * views.token_bytes
        if self._queues.running and wanted + promised > histories.capacity:
            return False
        while not histories.has_room(wanted + promised):
            if not (self._prefix_cache.evict_history(plan.prefix) or self._sessions.drop_history(session)):
                break
        if histories.has_room(wanted + promised) or not self._queues.running:
            sequence.history_end = _history_end(plan, sequence)
            return True
        return False

    def _cannot_hold(self, wanted: int) -> PaceError | None:
        """Why a history of ``wanted`` bytes cannot be held, however much gives way."""
        histories, host = self._mover.histories, self._mover.host.capacity
        capacity = histories.capacity
        if wanted <= host or (wanted <= capacity and histories.failure is None):
            return None
        if wanted <= capacity:
            return PaceError(f"the history needs the session directory, which cannot be written: {histories.failure}")
        return ContextLengthExceeded(
            f"the history would take {wanted:,} bytes, and this server has for all of them {host:,} of host memory "
            f"(--session-host-memory) and {capacity - host:,} on disk (--session-dir, --session-disk-size)",
            param="messages",
        )

    def _gives_way(self, sequence: Sequence, session: Session | None, plan: AdmissionPlan) -> bool:
        """Where nobody else holds anything, what a plan would go on from is itself in the way, and goes."""
        # a choice may be in its own request's way: the first one waits for it
        if self._queues.running or self._mover.is_busy or (self._queues.finishing and not sequence.is_branch):
            return False
        if plan.prefix is not None:
            self._prefix_cache.drop(plan.prefix)
            return True
        if session is None or not session.is_resident:
            return False
        self._sessions.drop(session)  # its log brings it back
        return True

    def _begin(self, sequence: Sequence, session: Session | None, plan: AdmissionPlan, needed: int) -> None:
        if sequence.request.session is not None and session is None:
            session = self._sessions.open(sequence.request.session)
            session.busy = True
        elif session is not None:
            self._sessions.touch(session)
            session.wanted = False
        note_findings(sequence, session, plan)
        sequence.session = None if sequence.is_branch else session
        sequence.table = self._cache.new_table(plan.table, plan.position, needed)
        self._cache.new_banks(sequence, plan.row, session)
        sequence.lineage, sequence.question = plan.lineage, self.planner.question(sequence)
        sequence.begin(plan.work, self._clock(), index=plan.index, cursor=plan.cursor)
        if plan.prefix is not None:
            self._prefix_cache.use(plan.prefix, sequence)
        self._queues.waiting.remove(sequence)
        self._queues.running.append(sequence)
        if not sequence.is_branch:
            self._queues.admitted.append(sequence)

    def branch(self, parent: Sequence, sequence: Sequence) -> bool:
        """Let a choice go on from a copy of its parent's state at the prompt's end. False where there is no room: it is
        queued, first in line, and gets there by feeding the prompt as its parent did."""
        parent.num_branches -= 1
        sequence.prompt, sequence.max_tokens = parent.prompt, parent.max_tokens
        if not (self._cache.has_room(1) and self._cache.make_row()):
            self._queues.waiting.appendleft(sequence)
            return False
        turn = parent.turn
        own = dataclasses.replace(turn, ids=turn.ids[: parent.cursor])
        needed = blocks_for(parent.position) - parent.position // BLOCK
        sequence.question, sequence.recall = parent.question, parent.recall
        sequence.lineage, sequence.cached = parent.lineage, parent.cached
        sequence.table = self._cache.new_table(parent.table, parent.position, needed)
        self._cache.run_copies()
        self._cache.new_banks(sequence, parent.row, None)
        sequence.begin([own], self._clock(), index=parent.index)
        sequence.advance(parent.cursor)
        self._queues.running.append(sequence)
        return True


def _history_end(plan: AdmissionPlan, sequence: Sequence) -> int:
    """The position that a history may reach; 0 where it stays within its budget."""
    end = max(turn.end for turn in plan.work) + sequence.max_tokens
    budgets = [turn.budget.tokens for turn in plan.work if turn.budget is not None]
    return end if budgets and end > min(budgets) else 0


def _blocks_needed(plan: AdmissionPlan) -> int:
    """KV blocks for what a plan feeds, of a history beyond its budget as many as that has."""
    needed = blocks_for(max(turn.end for turn in plan.work)) - plan.position // BLOCK
    budgets = [turn.budget for turn in plan.work]
    if any(budget is None for budget in budgets):
        return needed
    return min(needed, max(budget.tokens for budget in budgets if budget is not None) // BLOCK)
