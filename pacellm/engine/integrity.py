"""That memory adds up."""

from __future__ import annotations

from collections import Counter, defaultdict

from pacellm.engine.queues import RequestQueues
from pacellm.errors import EngineError
from pacellm.kv.blocks import BlockAllocator, KVTable
from pacellm.kv.prefix_cache import PrefixCache
from pacellm.memory.pool import BankPool
from pacellm.sessions.store import SessionStore
from pacellm.view import BLOCK


class IntegrityError(EngineError):
    """Something leaked, is held twice or is about to be overwritten."""


class IntegrityCheck:
    """Holds what requests, sessions and cached prefixes have against what the memory has given out.

    Args:
        allocator, pool: the memory; pool is None without PA.
        queues, sessions, prefix_cache: who may hold it.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        pool: BankPool | None,
        queues: RequestQueues,
        sessions: SessionStore,
        prefix_cache: PrefixCache,
    ) -> None:
        self._allocator, self._pool = allocator, pool
        self._queues, self._sessions, self._prefix_cache = queues, sessions, prefix_cache

    def check(self) -> None:
        """Blocks and rows add up: everything that is held is held by a running request, a session or a cached prefix,
        and no running request writes where somebody else's KV lies.

        Raises:
            IntegrityError: they do not.
        """
        self._check_blocks()
        if self._pool is not None:
            self._check_rows(self._pool)
        self._check_writes()

    def _check_blocks(self) -> None:
        working = [*self._queues.running, *self._queues.finishing]
        tables = [sequence.table for sequence in working] + self._sessions.tables() + self._prefix_cache.tables()
        held = Counter(block for table in tables for block in table.blocks)
        count = self._allocator.num_blocks
        wrong = [block for block in range(count) if self._allocator.references(block) != held[block]]
        if wrong or self._allocator.num_free != count - len(held):
            raise IntegrityError(f"KV blocks do not add up: {wrong[:8]}")

    def _check_rows(self, pool: BankPool) -> None:
        working = [*self._queues.running, *self._queues.finishing]
        rows = [sequence.row for sequence in working] + self._sessions.rows() + self._prefix_cache.rows()
        if len(set(rows)) != len(rows) or pool.num_free != pool.num_rows - len(rows):
            raise IntegrityError("bank rows do not add up")

    def _check_writes(self) -> None:
        held: dict[int, list[tuple[object, int]]] = defaultdict(list)  # who holds a block, theirs up to which position
        for holder, table, end in self._holders():
            for number, block in enumerate(table.blocks):
                held[block].append((holder, min(end, (number + 1) * BLOCK + table.view.offset)))
        for sequence in self._queues.running:
            for block in sequence.table.blocks[sequence.table.place(sequence.position) // BLOCK :]:
                if any(holder is not sequence and end > sequence.position for holder, end in held[block]):
                    raise IntegrityError(f"request {sequence.id} would overwrite KV block {block}, "
                                         "which is not its own")  # fmt: skip

    def _holders(self) -> list[tuple[object, KVTable, int]]:
        """(who, the table, the position up to which it is theirs)."""
        found: list[tuple[object, KVTable, int]] = [(one, one.table, one.position) for one in self._prefix_cache]
        found += [(s, s.table, len(s.context)) for s in self._sessions if s.table is not None and not s.loading]
        return found + [(s, s.table, s.position) for s in self._queues.running]
