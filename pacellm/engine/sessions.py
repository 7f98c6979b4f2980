"""Sessions: a log each, and the KV and banks that are caches of it.

A session *is* its log of turns. KV blocks and the bank row can be dropped at any time while no request works on
them, and are rebuilt by feeding the log again with its recorded cuts. Idle state goes least recently used
first, under a byte budget; logs have a budget of their own, and a session whose log went is ``lost``.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

from pacellm.engine.kv import BlockAllocator, KVTable
from pacellm.engine.sequence import Sequence, Turn
from pacellm.memory.pool import BankPool
from pacellm.memory.state import BankState
from pacellm.types import SessionStatus

Key = tuple[str, str]
_TOMBSTONES = 65536


@dataclass
class Session:
    """One session.

    Attributes:
        key: (tenant, id).
        log: turns since creation or the last fold.
        context: the ids that its KV stands for.
        table: its committed KV, None where dropped.
        row: its committed bank row, None where dropped or never used.
        origin: host copies of its banks at the last fold, by layer.
        busy: a running request works on it.
        status: what the next request finds.
    """

    key: Key
    log: list[Turn] = field(default_factory=list)
    context: array[int] = field(default_factory=lambda: array("i"))
    table: KVTable | None = None
    row: int | None = None
    origin: dict[int, BankState] | None = None
    busy: bool = False
    status: SessionStatus = "new"
    commits: int = 0
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)

    @property
    def is_resident(self) -> bool:
        """KV, and banks if it has any, are in place."""
        return self.table is not None

    @property
    def log_tokens(self) -> int:
        """Tokens fed since creation or the last fold."""
        return sum(len(turn.ids) for turn in self.log)


class SessionStore:
    """All sessions, and what of theirs is resident.

    Args:
        allocator, pool: where KV blocks and bank rows come from; pool is None without PA.
        block_bytes: KV bytes of one block over all layers.
        memory: bytes of idle KV and banks to keep.
        log_memory: bytes of logs to keep.
        fold_after: log tokens after which a log is folded.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        pool: BankPool | None,
        *,
        block_bytes: int,
        memory: int,
        log_memory: int,
        fold_after: int,
    ) -> None:
        self._allocator, self._pool = allocator, pool
        self._block_bytes, self._memory = block_bytes, memory
        self._log_memory, self._fold_after = log_memory, fold_after
        self._sessions: OrderedDict[Key, Session] = OrderedDict()  # least recently used first
        self._lost: OrderedDict[Key, None] = OrderedDict()
        self._log_bytes = 0
        self.evictions = 0
        self.losses = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_resident(self) -> int:
        """Sessions whose KV is in place."""
        return sum(session.is_resident for session in self._sessions.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of KV and banks that sessions hold, apart from running requests' working copies."""
        return sum(self._bytes(session) for session in self._sessions.values())

    @property
    def log_bytes(self) -> int:
        """Bytes of all logs."""
        return self._log_bytes

    def get(self, key: Key) -> Session | None:
        """The session, or None."""
        return self._sessions.get(key)

    def open(self, key: Key) -> Session:
        """The session of a request that is being admitted, created where there is none."""
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(key)
            if key in self._lost:
                del self._lost[key]
                session.status = "lost"
        session.last_used = time.time()
        self._sessions.move_to_end(key)
        return session

    def close(self, session: Session, *, keep: bool) -> None:
        """The request on it has ended; ``keep`` is False where nothing was ever committed."""
        session.busy = False
        if not keep and not session.commits and self._sessions.get(session.key) is session:
            if session.status == "lost":
                self._lost[session.key] = None
            del self._sessions[session.key]

    def commit(self, session: Session, sequence: Sequence) -> SessionStatus:
        """Take over a finished request's working copy as the session's state.

        Returns:
            The request's session status, ``folded`` where the log was folded now.
        """
        turn = sequence.fed()
        self._drop_state(session)
        session.table, sequence.table = sequence.table, KVTable()
        session.row, sequence.row = sequence.row, None
        if self._pool is not None and session.row is not None:
            self._pool.settle(session.row)
        del session.context[turn.start :]
        session.context.extend(turn.ids)
        session.log.append(turn)
        session.commits += 1
        session.last_used = time.time()
        self._log_bytes += turn.ids.itemsize * len(turn.ids)
        if session.log_tokens > self._fold_after:
            self._fold(session)
            return "folded"
        return sequence.session_status

    def trim(self) -> None:
        """Drop idle state beyond the byte budgets, least recently used first."""
        while self.resident_bytes > self._memory and self.evict_one():
            pass
        for key in list(self._sessions):
            if self._log_bytes <= self._log_memory:
                break
            if not self._sessions[key].busy:
                self._lose(self._sessions[key])

    def evict_one(self, *, needs_row: bool = False) -> bool:
        """Drop the KV and banks of the idle session used longest ago. False where there is none."""
        for session in self._sessions.values():
            if session.is_resident and not session.busy and (session.row is not None or not needs_row):
                self.evict(session)
                return True
        return False

    def evict(self, session: Session) -> None:
        """Drop a session's KV and banks; its log stays."""
        self._drop_state(session)
        self.evictions += 1

    def idle_blocks(self) -> int:
        """Blocks that evicting every idle session would free."""
        held: dict[int, int] = {}
        for session in self._sessions.values():
            if session.table is not None and not session.busy:
                for block in session.table.blocks:
                    held[block] = held.get(block, 0) + 1
        return sum(self._allocator.references(block) == count for block, count in held.items())

    def tables(self) -> list[KVTable]:
        """Every resident session's table."""
        return [session.table for session in self._sessions.values() if session.table is not None]

    def rows(self) -> list[int]:
        """Every resident session's bank row."""
        return [session.row for session in self._sessions.values() if session.row is not None]

    def _bytes(self, session: Session) -> int:
        kv = len(session.table.blocks) * self._block_bytes if session.table is not None else 0
        return kv + (self._pool.bytes_per_row if self._pool is not None and session.row is not None else 0)

    def _drop_state(self, session: Session) -> None:
        if session.table is not None:
            self._allocator.release(session.table.blocks)
            session.table = None
        if session.row is not None and self._pool is not None:
            self._pool.release(session.row)
            session.row = None

    def _fold(self, session: Session) -> None:
        """The banks become the origin that the log starts from; the context is forgotten."""
        if session.row is not None and self._pool is not None:
            session.origin = {
                layer: BankState(*(tensor.detach().cpu().clone() for tensor in bank))
                for layer, bank in self._pool.banks(session.row).items()
            }
        self._log_bytes -= sum(turn.ids.itemsize * len(turn.ids) for turn in session.log)
        session.log, session.context = [], array("i")
        if session.table is not None:
            self._allocator.release(session.table.blocks)
            session.table = KVTable()

    def _lose(self, session: Session) -> None:
        self._drop_state(session)
        self._log_bytes -= sum(turn.ids.itemsize * len(turn.ids) for turn in session.log)
        del self._sessions[session.key]
        self._lost[session.key] = None
        self.losses += 1
        while len(self._lost) > _TOMBSTONES:
            self._lost.popitem(last=False)
