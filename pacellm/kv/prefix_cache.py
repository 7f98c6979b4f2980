"""Prefixes of prompts that were computed before: KV and banks together, at ends of segments, for whoever feeds the same
again.

A cached prefix is keyed by what led to it, never by contents: the tenant, the state it started from (nothing, or a
session at one of its generations), the turn, and its ids from the turn's start. Within one engine the model, the config
and so the cuts are the same. Cached prefixes are idle: they hold references to KV blocks and a bank row of their own,
and may be taken away at any time, before any session.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pacellm.engine.sequence import CountsBefore, Lineage, Sequence
from pacellm.kv.blocks import BlockAllocator, KVTable, blocks_for
from pacellm.memory.pool import BankPool
from pacellm.modes import PAMode
from pacellm.sessions.turn import Turn
from pacellm.view import BLOCK, Budget, View

_MOST = 64


@dataclass(eq=False)
class CachedPrefix:
    """State after ``ids`` of turn ``index``, which began at ``start``.

    Attributes:
        lineage: (tenant, session or None, its generation).
        table: blocks up to ``position``, without a front; the last may go on with somebody else's tokens.
        row: banks as they stood at ``position``; None without PA.
        maker: id of the request that made it; ``session``: that request's.
        before: where the turn began, if it was that request's own.
    """

    lineage: Lineage
    index: int
    start: int
    ids: array[int]
    pa: PAMode
    budget: Budget | None
    table: KVTable
    row: int | None
    maker: str
    session: tuple[str, str] | None
    before: CountsBefore | None

    @property
    def position(self) -> int:
        """Tokens of context that it stands for."""
        return self.start + len(self.ids)


class PrefixCache:
    """All cached prefixes, least recently used first.

    Args:
        allocator, pool: where blocks and rows are held; pool is None without PA.
        segment: prefixes lie at multiples of it.
        max_seqs: working rows, which prefixes never take.
    """

    def __init__(self, allocator: BlockAllocator, pool: BankPool | None, *, segment: int, max_seqs: int) -> None:
        self._allocator, self._pool, self._segment, self._max_seqs = allocator, pool, segment, max_seqs
        self._prefixes: list[CachedPrefix] = []
        self.hits = 0
        self.hit_tokens = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[CachedPrefix]:
        return iter(list(self._prefixes))

    def find(self, lineage: Lineage, turns: list[Turn], question: int | None = None) -> CachedPrefix | None:
        """The prefix that saves most of feeding ``turns``, the last of which is the request's own; None without.

        Args:
            question: the first position that sees what is called back; no prefix goes beyond it.
        """
        best: CachedPrefix | None = None
        for prefix in self._prefixes:
            is_deeper = prefix.lineage == lineage and (best is None or _depth(prefix) > _depth(best))
            if is_deeper and _fits(prefix, turns, question):
                best = prefix
        return best

    def use(self, prefix: CachedPrefix, sequence: Sequence) -> None:
        """A sequence goes on from it. The tokens of its own turn that it saves are its own all the same."""
        if len(sequence.work) == 1 and prefix.before is not None:
            sequence.before = prefix.before
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)
        self.hits += 1
        self.hit_tokens += len(prefix.ids)

    # -- keeping -------------------------------------------------------------------------------------------

    def boundary(self, sequence: Sequence) -> int | None:
        """The last segment's end whose state a sequence has right now.

        None where there is none in this turn, or where a later turn goes back behind it and will write over its KV.
        """
        turn, position = sequence.turn, sequence.position
        if position >= turn.prompt_end:
            return None
        end = position - position % self._segment
        if sequence.question is not None and len(sequence.work) == 1 and end > _last_read(sequence):
            return None  # what was called back for a question is for that one alone
        goes_back = any(later.start < end for later in sequence.work[1:])
        return end if end > turn.start and not goes_back else None

    def keep(self, sequence: Sequence, num_running: int) -> None:
        """Copy a running sequence's state at its last segment's end; of its older prefixes a few stay, further and
        further apart."""
        end = self.boundary(sequence)
        mine = self._made_by(sequence)
        if end is None or any(prefix.position >= end for prefix in mine) or not self._has_row(num_running):
            return
        row = self._pool.take(sequence.row) if self._pool is not None and sequence.row is not None else None
        table = _settled(sequence.table, end)
        self._allocator.share(table.blocks)
        self._add(sequence, end, table, row)
        self._thin(mine, end)

    def take_over(self, sequence: Sequence) -> None:
        """Keep the state of a sequence that ends before its time: its blocks and row become a prefix's."""
        end = self.boundary(sequence)
        if end is None or (self._pool is not None and sequence.row is None):
            return
        if any(prefix.position >= end for prefix in self._made_by(sequence)):
            return
        table = _settled(sequence.table, end)
        front = sequence.table.view.front // BLOCK
        self._allocator.release(sequence.table.blocks[:front])
        self._allocator.release(sequence.table.blocks[front + len(table.blocks) :])
        if self._pool is not None and sequence.row is not None:
            self._pool.settle(sequence.row)
        self._add(sequence, end, table, sequence.row)
        sequence.table, sequence.row = KVTable(), None

    def _made_by(self, sequence: Sequence) -> list[CachedPrefix]:
        """Those of the turn that it feeds now."""
        return [prefix for prefix in self._prefixes if (prefix.maker, prefix.index) == (sequence.id, sequence.index)]

    def _add(self, sequence: Sequence, end: int, table: KVTable, row: int | None) -> None:
        assert sequence.lineage is not None
        turn = sequence.turn
        while len(self._prefixes) >= _MOST:
            self.drop(self._prefixes[0])
        ids, request = turn.ids[: end - turn.start], sequence.request
        self._prefixes.append(
            CachedPrefix(
                sequence.lineage,
                sequence.index,
                turn.start,
                ids,
                turn.pa,
                turn.budget,
                table,
                row,
                request.request_id,
                request.session,
                sequence.before if len(sequence.work) == 1 else None,
            )
        )

    def _thin(self, mine: list[CachedPrefix], newest: int) -> None:
        """One prefix for every power of two segments behind the newest."""
        seen: set[int] = set()
        for prefix in sorted(mine, key=lambda prefix: prefix.position):
            distance = ((newest - prefix.position) // self._segment).bit_length()
            if distance in seen:
                self.drop(prefix)
            seen.add(distance)

    def _has_row(self, num_running: int) -> bool:
        """A row is free beside those that running requests may still need."""
        if self._pool is None:
            return True
        reserve = max(0, self._max_seqs - num_running)
        while self._pool.num_free <= reserve and self.evict_one():
            pass
        return self._pool.num_free > reserve

    # -- letting go ----------------------------------------------------------------------------------------

    def evict_one(self) -> bool:
        """Drop the prefix used longest ago. False where there is none."""
        if not self._prefixes:
            return False
        self.drop(self._prefixes[0])
        return True

    def evict_history(self, keep: CachedPrefix | None) -> bool:
        """Drop the prefix used longest ago that holds a history, but not ``keep``. False where there is none."""
        for prefix in self._prefixes:
            if prefix.table.history.blocks and prefix is not keep:
                self.drop(prefix)
                return True
        return False

    def drop(self, prefix: CachedPrefix) -> None:
        """Give a prefix's blocks and row back."""
        self._prefixes.remove(prefix)
        self._allocator.release(prefix.table.blocks)
        if prefix.row is not None and self._pool is not None:
            self._pool.release(prefix.row)

    def forget_session(self, key: tuple[str, str], *, made: bool) -> None:
        """Drop what started from a session's state; with ``made`` also what its requests made from nothing."""
        self._drop_where(lambda prefix: prefix.lineage[1] == key or (made and prefix.session == key))

    def forget_tenant(self, tenant: str) -> None:
        """Drop all of a tenant's prefixes."""
        self._drop_where(lambda prefix: prefix.lineage[0] == tenant)

    def forget_request(self, request_id: str) -> None:
        """Drop what a request has made."""
        self._drop_where(lambda prefix: prefix.maker == request_id)

    def _drop_where(self, condition: Callable[[CachedPrefix], bool]) -> None:
        for prefix in [prefix for prefix in self._prefixes if condition(prefix)]:
            self.drop(prefix)

    def clear(self) -> None:
        """Drop everything."""
        while self.evict_one():
            pass

    def tables(self) -> list[KVTable]:
        """Every prefix's table."""
        return [prefix.table for prefix in self._prefixes]

    def rows(self) -> list[int]:
        """Every prefix's row."""
        return [prefix.row for prefix in self._prefixes if prefix.row is not None]


def _last_read(sequence: Sequence) -> int:
    """The last position that sees nothing that was called back for the question."""
    turn = sequence.turn
    assert sequence.question is not None
    return max(sequence.question.start, 0 if turn.budget is None else turn.budget.tokens)


def _settled(table: KVTable, end: int) -> KVTable:
    """The part of a table before ``end``, without its front."""
    return KVTable(table.window[: blocks_for(end - table.view.start)], View(table.view.start), table.history.until(end))


def _fits(prefix: CachedPrefix, turns: list[Turn], question: int | None) -> bool:
    if prefix.index >= len(turns):
        return False
    turn, later = turns[prefix.index], turns[prefix.index + 1 :]
    if any(other.start < prefix.position for other in later):
        return False  # a turn that goes back would write over the prefix's KV
    if (prefix.start, prefix.pa, prefix.budget) != (turn.start, turn.pa, turn.budget):
        return False
    if prefix.position >= turn.prompt_end or (question is not None and prefix.position > question):
        return False
    if prefix.index < len(turns) - 1:
        return True  # a turn of the log, which is the same as long as the generation is
    mine = np.frombuffer(prefix.ids, dtype=np.int32)
    return bool((mine == np.frombuffer(turn.ids, dtype=np.int32)[: len(mine)]).all())


def _depth(prefix: CachedPrefix) -> tuple[int, int]:
    return prefix.index, prefix.position
