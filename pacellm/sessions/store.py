"""Sessions: a log each, and the KV and banks that are caches of it.

A session *is* its log of turns. KV blocks and the bank row can be dropped at any time while no request works on
them, and are rebuilt by feeding the log again with its recorded cuts. What gives way is for ``eviction.py``; a session
whose log went is ``lost``.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator

from pacellm.engine.sequence import Sequence
from pacellm.kv.blocks import BlockAllocator, KVTable
from pacellm.memory.pool import BankPool
from pacellm.memory.state import BankState
from pacellm.sessions.expiry import ExpiryCalendar
from pacellm.sessions.host_memory import HostMemory
from pacellm.sessions.session import Key, Session
from pacellm.sessions.turn import Turn
from pacellm.sessions.usage import TierUsage
from pacellm.types import SessionStatus

_TOMBSTONES = 65536


class SessionStore:
    """All sessions, and what of theirs is resident.

    Args:
        allocator, pool: where KV blocks and bank rows come from; pool is None without PA.
        host: the tier in host memory.
        block_bytes: KV bytes of one block over all layers.
        fold_after: log tokens after which a log is folded.
        ttl: seconds that a session lives unused, where it has no time of its own.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        pool: BankPool | None,
        host: HostMemory,
        *,
        block_bytes: int,
        fold_after: int,
        ttl: float | None = None,
    ) -> None:
        self._allocator, self._pool, self._host = allocator, pool, host
        self._block_bytes, self._fold_after, self._ttl = block_bytes, fold_after, ttl
        self._sessions: OrderedDict[Key, Session] = OrderedDict()  # least recently used first
        self._by_tenant: dict[str, OrderedDict[Key, Session]] = {}  # the same
        self.usage, self._expiry = TierUsage(), ExpiryCalendar()
        self._holding: dict[int, Session] = {}  # by id: those with a table, deleted ones that still move included
        self._lost: OrderedDict[Key, None] = OrderedDict()
        self._log_bytes = 0
        self._next_expiry = 0.0
        self.losses = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    @property
    def num_resident(self) -> int:
        """Sessions whose KV is in place."""
        return sum(session.is_resident for session in list(self._holding.values()))

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that sessions hold, apart from running requests' working copies; shared blocks count once."""
        blocks = {block for session in list(self._holding.values()) if session.table for block in session.table.blocks}
        return len(blocks) * self._block_bytes

    @property
    def bank_bytes(self) -> int:
        """Bytes of banks that sessions hold on the device."""
        return len(self.rows()) * (self._pool.bytes_per_row if self._pool is not None else 0)

    @property
    def log_bytes(self) -> int:
        """Bytes of all logs."""
        return self._log_bytes

    def get(self, key: Key | None) -> Session | None:
        """A session that exists, or None; also for no key."""
        return None if key is None else self._sessions.get(key)

    def of(self, tenant: str) -> list[Session]:
        """A tenant's sessions, most recently used first."""
        return list(reversed(self._by_tenant.get(tenant, OrderedDict()).values()))

    def count(self, tenant: str) -> int:
        """How many a tenant has. Any thread may ask."""
        return len(self._by_tenant.get(tenant, ()))

    def open(self, key: Key) -> Session:
        """The session of a request that is being admitted, created where there is none."""
        session = self._sessions.get(key)
        if session is None:
            session = Session(key, ttl=self._ttl)
            self._put_in(session)
            if key in self._lost:
                del self._lost[key]
                session.status = "lost"
        self.touch(session)
        return session

    def was_lost(self, key: Key) -> bool:
        """There was such a session, and its log is gone."""
        return key in self._lost

    def touch(self, session: Session) -> None:
        """It is the one used last."""
        session.last_used = time.time()
        self._sessions.move_to_end(session.key)
        self._by_tenant[session.key[0]].move_to_end(session.key)

    def _put_in(self, session: Session) -> None:
        before = self._sessions.get(session.key)
        if before is not None and before is not session:
            self._take_out(before)
        self._sessions[session.key] = session
        self._by_tenant.setdefault(session.key[0], OrderedDict())[session.key] = session
        session.observer = self
        self.usage.enter(session)
        self._expiry.note(session)

    def tier_changed(self, session: Session) -> None:
        """A session tells that what it holds, or where, is another."""
        self.usage.enter(session)

    def expiry_changed(self, session: Session) -> None:
        """A session tells that its time is another."""
        self._expiry.note(session)

    def forget_stub(self, session: Session) -> None:
        """Take a session out whose log is on disk only: the disk still knows it."""
        self._take_out(session)

    def _take_out(self, session: Session) -> None:
        del self._sessions[session.key]
        others = self._by_tenant[session.key[0]]
        del others[session.key]
        if not others:
            del self._by_tenant[session.key[0]]
        session.observer = None
        self.usage.leave(session)
        self._expiry.forget(session)

    def add(self, session: Session) -> None:
        """A session that was made elsewhere: forked, imported or found on disk."""
        self._put_in(session)
        self._lost.pop(session.key, None)
        self._log_bytes += session.log_bytes
        if session.table is not None:
            self._holding[id(session)] = session

    def close(self, session: Session, *, keep: bool) -> None:
        """The request on it has ended; ``keep`` is False where nothing was ever committed."""
        session.busy = False
        if session.deleted:
            self.drop(session)
        if not keep and not session.commits and not session.kept and self._sessions.get(session.key) is session:
            if session.stub or session.moving:
                return
            if session.status == "lost":
                self._lost[session.key] = None
            self._take_out(session)

    def will_fold(self, session: Session, turn: Turn) -> bool:
        """Committing ``turn`` makes the log longer than it may be."""
        return session.log_tokens + len(turn.ids) > self._fold_after

    def commit(self, session: Session, sequence: Sequence) -> SessionStatus:
        """Take over a finished request's working copy as the session's state.

        Returns:
            The request's session status, ``folded`` where the log was folded now.
        """
        turn = sequence.fed()
        folds = self.will_fold(session, turn)
        self.drop(session)
        sequence.table.drop_front(self._allocator)
        self.put(session, sequence.table, sequence.row)
        sequence.table, sequence.row = KVTable(), None
        if self._pool is not None and session.row is not None:
            self._pool.settle(session.row)
        del session.context[turn.start :]
        session.context.extend(turn.ids)
        session.log.append(turn)
        session.ending = sequence.ending
        session.commits += 1
        session.generation += 1
        session.status, session.found, session.note = "new", None, None
        self.touch(session)
        self._log_bytes += turn.ids.itemsize * len(turn.ids)
        if folds:
            self._fold(session)
            return "folded"
        return sequence.session_status

    def put(self, session: Session, table: KVTable, row: int | None) -> None:
        """The session holds this KV and row."""
        session.table, session.row = table, row
        self._holding[id(session)] = session

    def reset(self, session: Session) -> None:
        """Empty log, KV and banks."""
        self.drop(session)
        self._log_bytes -= session.log_bytes
        session.log, session.context, session.origin, session.ending = [], array("i"), None, None
        session.stub, session.num_tokens, session.commits, session.banks = False, 0, 0, {}
        session.ranks, session.parent = {}, None
        session.status, session.kept = "new", True
        session.generation += 1

    def remove(self, session: Session, *, lost: bool = False) -> None:
        """Take a session out; what the worker or a request still uses is freed when that ends."""
        session.deleted = True
        self._log_bytes -= session.log_bytes
        if self._sessions.get(session.key) is session:
            self._take_out(session)
        self._host.forget(session)
        if not session.moving and not session.busy:
            self.drop(session)
        if lost:
            self._lost[session.key] = None
            self.losses += 1
            while len(self._lost) > _TOMBSTONES:
                self._lost.popitem(last=False)

    def take_log_out(self, session: Session) -> None:
        """The log is on disk: its memory is given back."""
        self._log_bytes -= session.log_bytes
        session.num_tokens, session.stub = len(session.context), True
        session.log, session.context, session.origin = [], array("i"), None

    def put_log_in(self, session: Session, log: list[Turn], origin: dict[int, BankState] | None) -> None:
        """The log is back."""
        session.log, session.context, session.origin, session.stub = log, context_of(log), origin, False
        session.num_tokens = len(session.context)
        self._log_bytes += session.log_bytes

    # -- time ----------------------------------------------------------------------------------------------

    @property
    def may_expire(self) -> bool:
        """It is time to look for expired sessions."""
        return time.time() >= self._next_expiry

    def expired(self) -> list[Session]:
        """Sessions whose time has come, looked for once a second."""
        now = time.time()
        if now < self._next_expiry:
            return []
        self._next_expiry = now + 1.0
        return self._expiry.expired(now, self._next_expiry)

    # -- on the device -------------------------------------------------------------------------------------

    @property
    def holding(self) -> Collection[Session]:
        """Sessions with KV on the device, deleted ones that still move included; least recently given it first."""
        return self._holding.values()

    def idle_blocks(self, others: list[KVTable]) -> int:
        """Blocks that evicting every idle session, and other idle tables, would free; those being moved included."""
        held: Counter[int] = Counter()
        for table in others:
            held.update(table.blocks)
        for session in self._holding.values():
            if session.table is not None and not session.busy and not session.loading:
                held.update(session.table.blocks)
        return sum(self._allocator.references(block) == count for block, count in held.items())

    def leaving(self) -> tuple[int, int]:
        """(blocks, rows) that sessions on their way down will free."""
        moving = [s for s in self._holding.values() if s.moving and not s.loading and s.table is not None]
        held: Counter[int] = Counter()
        for session in moving:
            held.update(session.table.blocks if session.table is not None else ())
        blocks = sum(self._allocator.references(block) == count for block, count in held.items())
        return blocks, sum(session.row is not None for session in moving)

    def tables(self) -> list[KVTable]:
        """Every table that a session holds."""
        return [session.table for session in list(self._holding.values()) if session.table is not None]

    def rows(self) -> list[int]:
        """Every bank row that a session holds."""
        return [session.row for session in list(self._holding.values()) if session.row is not None]

    def drop(self, session: Session) -> None:
        """Let a session's KV and banks go from device and host, and forget what of them is on disk."""
        self.release(session)
        session.host, session.stored, session.wanted = None, None, False

    def release(self, session: Session) -> None:
        """Give a session's blocks and row back."""
        if session.table is not None:
            self._allocator.release(session.table.blocks)
            session.table = None
        if session.row is not None and self._pool is not None:
            self._pool.release(session.row)
            session.row = None
        session.loading = False
        self._holding.pop(id(session), None)

    def drop_history(self, keep: Session | None) -> bool:
        """Drop the state of the idle session used longest ago that holds a history, but not of ``keep``; its files or
        its log bring it back. False where there is none."""
        for session in self._sessions.values():
            if session.history.blocks and session is not keep and not session.in_use:
                (self.drop if session.stored is None else self.release)(session)
                return True
        return False

    def _fold(self, session: Session) -> None:
        """The banks become the origin that the log starts from; the context is forgotten."""
        if session.row is not None and self._pool is not None:
            session.origin = self._pool.copy_out(session.row)
        self._log_bytes -= session.log_bytes
        session.log, session.context = [], array("i")
        session.folds += 1
        if session.table is not None:
            self._allocator.release(session.table.blocks)
            session.table = KVTable()


def context_of(log: list[Turn]) -> array[int]:
    """The ids that a log's KV stands for."""
    context: array[int] = array("i")
    for turn in log:
        del context[turn.start :]
        context.extend(turn.ids)
    return context
