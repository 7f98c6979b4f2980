"""Working copies: KV blocks and bank rows for running requests, made at the price of idle state. No torch."""

from __future__ import annotations

from collections.abc import Callable

from pacellm.engine.queues import RequestQueues
from pacellm.engine.sequence import CountsBefore, Sequence
from pacellm.engine.step import Copy
from pacellm.kv.blocks import BlockAllocator, KVTable, blocks_for
from pacellm.kv.prefix_cache import CachedPrefix, PrefixCache
from pacellm.memory.pool import BankPool
from pacellm.recall.views import Views
from pacellm.sessions.eviction import Eviction
from pacellm.sessions.history_tier import HistoryTier
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore
from pacellm.view import BLOCK, View


class CacheManager:
    """Makes room, and gives it out. Cached prefixes go first, then idle sessions, least recently used first.

    Args:
        allocator, pool: the memory; pool is None without PA.
        sessions, eviction: who holds most of it, and who takes it from them.
        prefix_cache: prefixes of prompts that were computed before.
        histories: hold what leaves windows.
        queues: requests; each running one may need a block more.
        copy_kv: copies KV between slots now.
        views: changes what tables stand for; None where they always stand for everything.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        pool: BankPool | None,
        sessions: SessionStore,
        eviction: Eviction,
        prefix_cache: PrefixCache,
        histories: HistoryTier,
        queues: RequestQueues,
        copy_kv: Callable[[list[Copy]], None],
        views: Views | None = None,
    ) -> None:
        self._allocator, self._pool, self._sessions, self._eviction = allocator, pool, sessions, eviction
        self._prefix_cache, self._queues, self._copy_kv = prefix_cache, queues, copy_kv
        self._histories, self.views = histories, views
        self._copies: list[Copy] = []

    def take_copies(self) -> list[Copy]:
        """The KV to copy before the next step."""
        copies, self._copies = self._copies, []
        return copies

    def run_copies(self) -> None:
        """Copy it now, before what it is read from may be used otherwise."""
        self._copy_kv(self.take_copies())

    # -- room ----------------------------------------------------------------------------------------------

    def has_blocks(self, blocks: int) -> bool:
        """There are so many at all."""
        return blocks <= self._allocator.num_blocks

    def has_room(self, blocks: int, keep: CachedPrefix | None = None) -> bool:
        """``blocks`` are free beside one for every running sequence, or have been made so; ``keep`` is not touched."""
        return self.make_room(blocks + len(self._queues.running), keep)

    def make_room(self, blocks: int, keep: CachedPrefix | None = None) -> bool:
        """Free ``blocks``, without touching ``keep``; where nothing runs, as many of them as there are."""
        if self._allocator.num_free >= blocks:
            return True
        needed = blocks if self._queues.running else min(blocks, self._allocator.num_blocks)
        others = [prefix.table for prefix in self._prefix_cache if prefix is not keep]
        if self._allocator.num_free + self._sessions.idle_blocks(others) < needed:
            return False
        self._drop_prefixes(needed, keep)
        while self._allocator.num_free + self._sessions.leaving()[0] < needed and self._eviction.evict_one():
            pass
        return self._allocator.num_free >= needed

    def _drop_prefixes(self, needed: int, keep: CachedPrefix | None) -> None:
        for prefix in self._prefix_cache:
            if self._allocator.num_free < needed and prefix is not keep:
                self._prefix_cache.drop(prefix)

    def make_row(self, keep: CachedPrefix | None = None) -> bool:
        """Free a bank row, without touching ``keep``."""
        if self._pool is None:
            return True
        for prefix in self._prefix_cache:
            if not self._pool.num_free and prefix is not keep:
                self._prefix_cache.drop(prefix)
        while not self._pool.num_free + self._sessions.leaving()[1] and self._eviction.evict_one(needs_row=True):
            pass
        return self._pool.num_free > 0

    def free_rows(self, wanted: int) -> None:
        """Cached prefixes never take the ``wanted`` rows that running requests may need."""
        while self._pool is not None and self._pool.num_free < wanted:
            if not self._prefix_cache.evict_one():
                return

    @property
    def is_draining(self) -> bool:
        """Blocks are on their way to being free, or host memory for what leaves them."""
        return self._is_freeing_blocks or self._histories.is_draining

    @property
    def _is_freeing_blocks(self) -> bool:
        return self._sessions.leaving()[0] > 0

    # -- working copies ------------------------------------------------------------------------------------

    def new_table(self, source: KVTable, start: int, needed: int) -> KVTable:
        """A table that shares the full blocks of ``source``'s window before ``start`` and owns ``needed`` behind."""
        if start < source.view.start:
            table = KVTable([], source.view, source.history)
            assert self.views is not None
            self.views.go_back(table, start)
            table.extend(self._allocator.allocate(needed - 1, table.blocks[-1]))
            return table
        window, kept = source.window, (start - source.view.start) // BLOCK
        table = KVTable(list(window[:kept]), View(source.view.start), source.history.until(start))
        own = self._allocator.allocate(needed, table.blocks[-1] if table.blocks else None)
        self._allocator.share(table.blocks)
        table.extend(own)
        if start % BLOCK:
            self._copies.append(Copy(window[kept] * BLOCK, table.blocks[kept] * BLOCK, start % BLOCK))
        return table

    def extend(self, table: KVTable) -> bool:
        """One block more, at the price of idle state. False where there is none."""
        while not self._allocator.num_free:
            if not (self._prefix_cache.evict_one() or (not self._is_freeing_blocks and self._eviction.evict_one())):
                return False
        table.extend(self._allocator.allocate(1, table.blocks[-1] if table.blocks else None))
        return True

    def fits(self, sequence: Sequence, until: int) -> bool:
        """Have a sequence's table stand for what its next token sees, with room for tokens before position ``until``,
        at the price of idle state. False where there is none."""
        if not self._show(sequence):
            return False
        while sequence.table.capacity < until:
            if not self.extend(sequence.table):
                return False
        return True

    def _show(self, sequence: Sequence) -> bool:
        if self.views is None:
            return True
        table, position = sequence.table, sequence.position
        view = sequence.turn.view(position)
        if view == table.view:
            return True
        wanted = self.views.history_bytes_for(table, view)
        if wanted and not self._histories.make_room(wanted):
            return False
        self.run_copies()
        if position < table.history.tokens:  # the log goes back here
            if not self.make_room(1):
                return False
            self.views.go_back(table, position)
        spare = table.blocks[blocks_for(table.place(position)) :]
        self._allocator.release(spare)
        table.replace(table.blocks[: len(table.blocks) - len(spare)], table.view)
        if not self.make_room(self.views.blocks_for(table, view)):
            return False
        self.views.show(table, view)
        for _ in range(min(len(spare), self._missing(sequence))):
            if not self.extend(table):
                break  # the others come when they are needed
        return True

    def _missing(self, sequence: Sequence) -> int:
        """Blocks that the known tokens of a sequence still take, within its budget."""
        table, turn = sequence.table, sequence.turn
        wanted = blocks_for(table.place(turn.end))
        if turn.budget is not None:
            wanted = min(wanted, turn.budget.tokens // BLOCK)
        return wanted - len(table.blocks)

    def new_banks(self, sequence: Sequence, source: int | None, session: Session | None) -> None:
        """A row for the sequence: a copy of ``source``, or what the session began with."""
        if self._pool is None:
            return
        sequence.row = self._pool.check_out(source)
        if source is None and session is not None and session.origin is not None:
            for layer, bank in self._pool.banks(sequence.row).items():
                bank.copy_(session.origin[layer])
        if not (sequence.is_branch and sequence.generated):  # a choice's own tokens begin where its prompt ended
            self.mark(sequence)
        sequence.working_sets.clear()

    def mark(self, sequence: Sequence) -> None:
        """What its banks and experts do from here on is the request's own."""
        if self._pool is not None and sequence.row is not None:
            sequence.before = CountsBefore(self._pool.counters(sequence.row), self._pool.activity(sequence.row))

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's working copy away."""
        self._allocator.release(sequence.table.blocks)
        sequence.table = KVTable()
        if sequence.row is not None and self._pool is not None:
            self._pool.release(sequence.row)
            sequence.row = None
