"""Working copies: KV blocks and bank rows for running requests, made at the price of idle state. No torch."""

from __future__ import annotations

from collections.abc import Callable

from pacellm.engine.sequence import Before, Sequence
from pacellm.engine.step import Copy
from pacellm.kv.blocks import BLOCK, BlockAllocator, KVTable
from pacellm.kv.prefix import Entry, PrefixCache
from pacellm.memory.pool import BankPool
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore


class Room:
    """Makes room, and gives it out. Kept progress goes first, then idle sessions, least recently used first.

    Args:
        allocator, sessions, pool: the memory; pool is None without PA.
        progress: kept prefill progress.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        sessions: SessionStore,
        pool: BankPool | None,
        progress: PrefixCache,
    ) -> None:
        self.allocator, self.sessions, self.pool, self.progress = allocator, sessions, pool, progress
        # copies KV between slots at once; who has the KV sets it
        self.copy_now: Callable[[list[Copy]], None] = lambda copies: None
        self._copies: list[Copy] = []

    def take_copies(self) -> list[Copy]:
        """The KV to copy before the next step."""
        copies, self._copies = self._copies, []
        return copies

    def run_copies(self) -> None:
        """Copy it now, before what it is read from may be used otherwise."""
        self.copy_now(self.take_copies())

    def make_room(self, blocks: int, *, is_alone: bool, keep: Entry | None = None) -> bool:
        """Free ``blocks``, without touching ``keep``; where a request is alone, as many of them as there are."""
        if self.allocator.num_free >= blocks:
            return True
        needed = min(blocks, self.allocator.num_blocks) if is_alone else blocks
        others = [entry.table for entry in self.progress if entry is not keep]
        if self.allocator.num_free + self.sessions.idle_blocks(others) < needed:
            return False
        for entry in self.progress:
            if self.allocator.num_free < needed and entry is not keep:
                self.progress.drop(entry)
        while self.allocator.num_free + self.sessions.leaving()[0] < needed and self.sessions.evict_one():
            pass
        return self.allocator.num_free >= needed

    def make_row(self, keep: Entry | None = None) -> bool:
        """Free a bank row, without touching ``keep``."""
        if self.pool is None:
            return True
        for entry in self.progress:
            if not self.pool.num_free and entry is not keep:
                self.progress.drop(entry)
        while not self.pool.num_free + self.sessions.leaving()[1] and self.sessions.evict_one(needs_row=True):
            pass
        return self.pool.num_free > 0

    def new_table(self, source: list[int], start: int, needed: int) -> KVTable:
        """A table that shares the full blocks before ``start`` and owns the rest."""
        kept = start // BLOCK
        table = KVTable(list(source[:kept]))
        own = self.allocator.allocate(needed, table.blocks[-1] if table.blocks else None)
        self.allocator.share(table.blocks)
        table.extend(own)
        if start % BLOCK:
            self._copies.append(Copy(source[kept] * BLOCK, table.blocks[kept] * BLOCK, start % BLOCK))
        return table

    def new_banks(self, sequence: Sequence, source: int | None, session: Session | None) -> None:
        """A row for the sequence: a copy of ``source``, or what the session began with."""
        if self.pool is None:
            return
        sequence.row = self.pool.check_out(source)
        if source is None and session is not None and session.origin is not None:
            for layer, bank in self.pool.banks(sequence.row).items():
                bank.copy_(session.origin[layer])
        if not (sequence.is_branch and sequence.generated):  # a choice's own tokens begin where its prompt ended
            self.mark(sequence)
        sequence.working_sets.clear()

    def mark(self, sequence: Sequence) -> None:
        """What its banks and experts do from here on is the request's own."""
        if self.pool is not None and sequence.row is not None:
            sequence.before = Before(self.pool.counters(sequence.row), self.pool.activity(sequence.row))

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's working copy away."""
        self.allocator.release(sequence.table.blocks)
        sequence.table = KVTable()
        if sequence.row is not None and self.pool is not None:
            self.pool.release(sequence.row)
            sequence.row = None
