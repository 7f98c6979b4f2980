"""Sessions' KV and banks on the device, for operations: brought back, shared with a fork, copied out, filled in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pacellm.engine.step import Copy
from pacellm.kv.blocks import BlockAllocator, KVTable, OutOfBlocks, blocks_for
from pacellm.memory.pool import BankPool
from pacellm.memory.state import Banks, BankState, copy_banks
from pacellm.sessions.host_state import HostState, Span, download, spans_of
from pacellm.sessions.mover import Mover
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore
from pacellm.view import BLOCK


class DeviceState:
    """What operations do to state on the device.

    Args:
        store: the sessions. mover: brings their state back.
        allocator, pool, slabs: the device's memory; pool is None without PA.
        has_room: whether so many blocks are free beside what running requests may need, or have been made so.
        copy_kv: copies KV between slots now.
    """

    def __init__(
        self,
        store: SessionStore,
        mover: Mover,
        allocator: BlockAllocator,
        pool: BankPool | None,
        slabs: list[Tensor],
        *,
        has_room: Callable[[int], bool],
        copy_kv: Callable[[list[Copy]], None],
    ) -> None:
        self._store, self._mover, self._allocator, self._pool, self._slabs = store, mover, allocator, pool, slabs
        self._has_room, self._copy_kv = has_room, copy_kv

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return self._allocator.num_free

    def is_coming(self, session: Session) -> bool:
        """Its state is below the device and on its way up; where there is no room for it, only its log is left."""
        tokens = self._mover.stored_tokens(session)
        if tokens is None or not self._has_room_for(session, blocks_for(tokens) + 1):
            return False
        self._mover.restore(session)
        return True

    def _has_room_for(self, session: Session, blocks: int) -> bool:
        """Others give way, but not what it is made for: what leaves the device may push states off the disk."""
        was_busy, session.busy = session.busy, True
        has_room = self._has_room(blocks)
        session.busy = was_busy
        return has_room

    def share(self, source: Session, fork: Session) -> None:
        """Give a fork a resident source's state: full blocks are shared, the last one and the banks copied. Where there
        is no room it is a log, to be replayed."""
        if not source.is_resident or not self._has_block_and_row():
            return
        if source.table is None or source.moving:  # nothing else could give way
            return
        try:
            table = self._copy_table(source.table, source.kv_tokens)
        except OutOfBlocks:
            return
        row = self._pool.take(source.row) if self._pool is not None and source.row is not None else None
        self._store.put(fork, table, row)
        source.wanted = False

    def _copy_table(self, source: KVTable, tokens: int) -> KVTable:
        full, rest = divmod(tokens, BLOCK)
        blocks = list(source.blocks[:full])
        last = self._allocator.allocate(1, blocks[-1] if blocks else None) if rest else []
        self._allocator.share(blocks)
        if rest:
            self._copy_kv([Copy(source.blocks[full] * BLOCK, last[0] * BLOCK, rest)])
        return KVTable([*blocks, *last], source.view, source.history.until(source.view.start))

    def _has_block_and_row(self) -> bool:
        return self._has_room(1) and (self._pool is None or self._pool.num_free > 0)

    def bank(self, session: Session, layer: int) -> BankState | None:
        """One layer's bank, in device or host memory; None where it is in neither."""
        banks = session.host.banks if session.host is not None else self._banks(session.row)
        return banks.get(layer)

    def copy_out(self, session: Session, *, kv: bool) -> HostState | None:
        """A copy of a resident session's banks, and KV where asked; None where only the log is left."""
        if not session.is_resident or session.table is None:
            return None
        banks = self._banks(session.row)
        if not kv or not session.table.view.is_whole:
            return HostState([], copy_banks(banks), len(session.context))
        return download(self._slabs, spans_of(session.table), len(session.context), banks)

    def fill(self, session: Session, place: Callable[[int, list[Span], Banks], Any]) -> None:
        """Have a session's KV and banks put in place where there is room; else its log brings them back.

        Args:
            place: is given the tokens, where they go, and the banks to fill.
        """
        tokens = len(session.context)
        if not self._has_room(blocks_for(tokens)) or (self._pool is not None and not self._pool.num_free):
            return
        table = KVTable(self._allocator.allocate(blocks_for(tokens)))
        row = self._pool.take() if self._pool is not None else None
        place(tokens, spans_of(table), self._banks(row))
        self._store.put(session, table, row)

    def _banks(self, row: int | None) -> Banks:
        return self._pool.banks(row) if self._pool is not None and row is not None else {}
