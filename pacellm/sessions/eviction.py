"""What gives way: idle state under budgets of bytes and rows, logs under one of their own.

State goes to the tier below where there is one: that of the tenant that holds most first, least recently used first.
"""

from __future__ import annotations

from collections import Counter

from pacellm.memory.pool import BankPool
from pacellm.sessions.mover import Mover
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore

_STUBS = 65536


class Eviction:
    """Keeps sessions within their budgets, and makes room for requests.

    Args:
        store: the sessions. mover: takes them to the tiers below.
        pool: of banks; None without PA.
        block_bytes: KV bytes of one block over all layers.
        memory: bytes of idle KV to keep.
        max_rows: bank rows that idle sessions may hold.
        log_memory: bytes of logs to keep.

    Attributes:
        evictions: of states, so far.
    """

    def __init__(
        self,
        store: SessionStore,
        mover: Mover,
        pool: BankPool | None,
        *,
        block_bytes: int,
        memory: int,
        max_rows: int,
        log_memory: int,
    ) -> None:
        self._store, self._mover, self._pool = store, mover, pool
        self._block_bytes, self._memory, self._max_rows, self._log_memory = block_bytes, memory, max_rows, log_memory
        self.evictions = 0

    def trim(self) -> None:
        """Move or drop idle state beyond the budgets."""
        while self._over_memory() and self.evict_one():
            pass
        while self._pool is not None and self._resting_rows() > self._max_rows and self.evict_one(needs_row=True):
            pass
        if self._store.log_bytes > self._log_memory:
            self._trim_logs()
        if len(self._store) > _STUBS:
            self._trim_stubs()

    def _over_memory(self) -> bool:
        blocks = {
            block
            for session in self._store.holding
            if session.table is not None and not session.moving and not session.wanted
            for block in session.table.blocks
        }
        return len(blocks) * self._block_bytes > self._memory

    def _resting_rows(self) -> int:
        return sum(session.row is not None and not session.moving for session in self._store.holding)

    def _trim_logs(self) -> None:
        over = self._store.log_bytes - self._log_memory
        for session in self._store:
            if over <= 0:
                return
            if session.in_use or not session.log:
                continue
            over -= session.log_bytes
            if not self._mover.spill_log(session):
                self._store.remove(session, lost=True)

    def _trim_stubs(self) -> None:
        for session in self._store:
            if len(self._store) <= _STUBS:
                return
            if session.stub and not session.in_use:
                self._store.forget_stub(session)

    def evict_one(self, *, needs_row: bool = False) -> bool:
        """Move or drop the state of an idle session. False where there is none."""
        session = self._victim(needs_row)
        if session is None:
            return False
        self.evict(session)
        return True

    def _victim(self, needs_row: bool) -> Session | None:
        """Of the tenant that holds most, the session used longest ago; those brought back for a request last."""
        idle = [
            session
            for session in self._store.holding
            if not (session.busy or session.moving) and (session.row is not None or not needs_row)
        ]
        if not idle:
            return None
        held: Counter[str] = Counter()
        for session in self._store.holding:
            held[session.key[0]] += 1 if needs_row else len(session.table.blocks) if session.table is not None else 0
        return min(idle, key=lambda session: (session.wanted, -held[session.key[0]], session.last_used))

    def evict(self, session: Session) -> None:
        """Take a session's KV and banks off the device, into the tier below where there is one; its log stays."""
        self.evictions += 1
        session.wanted = False
        if not self._mover.spill(session):
            self._store.drop(session)
