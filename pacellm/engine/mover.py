"""Moves sessions between the device, host memory and disk, and records commits on disk, all off the step path.

The engine thread decides and owns all bookkeeping; the worker's thread copies and reads and writes files. What a job
touches (blocks, a row, a host copy) is held for it until its result is taken in the engine thread.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from pacellm.engine.kv import BlockAllocator, KVTable, blocks_for
from pacellm.engine.openings import Openings
from pacellm.engine.records import Records
from pacellm.engine.session import Key, Session
from pacellm.engine.sessions import SessionStore
from pacellm.engine.turn import Turn
from pacellm.errors import SessionConflict, SnapshotRefused
from pacellm.memory.disk import STATE, Disk, Owner
from pacellm.memory.pool import BankPool
from pacellm.memory.tiers import Banks, HostState, Span, Worker, banks_nbytes, copy_banks, download, upload

logger = logging.getLogger("pacellm.sessions")


@dataclass
class MoverStats:
    """Totals since the start: moves, their bytes and seconds, and what was refused."""

    spills: int = 0
    restores: int = 0
    spilled_bytes: int = 0
    restored_bytes: int = 0
    spill_seconds: float = 0.0
    restore_seconds: float = 0.0
    failures: int = 0
    refused: int = 0


class Mover:
    """Owns the tiers below the device.

    Args:
        store, allocator, pool: the engine's.
        slabs: KV memory.
        worker: runs the jobs.
        host_memory: bytes of KV and banks to keep in host memory.
        disk: the session directory, or None.
        records: None where nothing is ever written.
    """

    def __init__(
        self,
        store: SessionStore,
        allocator: BlockAllocator,
        pool: BankPool | None,
        slabs: list[Tensor],
        worker: Worker,
        *,
        host_memory: int,
        disk: Disk | None,
        records: Records | None,
        bytes_per_token: int,
    ) -> None:
        self.store, self._allocator, self._pool, self._slabs = store, allocator, pool, slabs
        self.worker, self.host_memory, self.disk, self.records = worker, host_memory, disk, records
        self._bytes_per_token = bytes_per_token
        self._in_host: dict[int, Session] = {}
        self._reserved = 0  # bytes of host copies that are being made
        self.openings = Openings(store, worker, disk, records)
        self.stats = MoverStats()
        store.spill, store.spill_log, store.forgotten = self.spill, self.spill_log, self._forgotten

    # -- host memory ---------------------------------------------------------------------------------------

    @property
    def host_bytes(self) -> int:
        """Bytes of KV and banks in host memory, those on their way included."""
        return self._reserved + sum(s.host.nbytes for s in list(self._in_host.values()) if s.host is not None)

    def _make_host_room(self, wanted: int) -> bool:
        """Room for ``wanted`` bytes, made before it is used: by jobs that run before the one that needs it."""
        self._in_host = {number: session for number, session in self._in_host.items() if session.host is not None}
        if wanted > self.host_memory:
            return False
        held: dict[str, int] = {}
        for session in self._in_host.values():
            held[session.key[0]] = held.get(session.key[0], 0) + (session.host.nbytes if session.host else 0)
        idle = [s for s in self._in_host.values() if not (s.moving or s.wanted or s.busy)]
        idle.sort(key=lambda session: (-held[session.key[0]], session.last_used))
        while self.host_bytes + wanted > self.host_memory and idle:
            self._leave_host(idle.pop(0))
        return self.host_bytes + wanted <= self.host_memory

    def _leave_host(self, session: Session) -> None:
        state, session.host = session.host, None
        if state is None:
            return
        if self.disk is None or self.records is None or session.deleted:
            state.clear()
            return
        tensors = self.records.host_tensors(state)

        def job() -> int:
            try:
                return self._save(snapshot, tensors)
            finally:
                tensors.clear()
                state.clear()

        snapshot = self._freeze(session)
        session.moving = True
        self.worker.submit(job, lambda done: self._saved(session, snapshot, done))

    # -- down ----------------------------------------------------------------------------------------------

    def spill(self, session: Session) -> bool:
        """Take an idle session's KV and banks off the device. False where there is no tier for them."""
        if session.table is None or session.moving or session.deleted:
            return False
        if session.stored is not None:
            self.store.release(session)  # the disk has this generation already
            return True
        tokens, banks = len(session.context), self._banks(session)
        if not tokens:
            return False
        nbytes = tokens * self._bytes_per_token + banks_nbytes(banks)
        spans = _spans(session.table)
        if self._make_host_room(nbytes):
            self._reserved += nbytes
            session.moving = True
            self.worker.submit(
                lambda: _timed(lambda: download(self._slabs, spans, tokens, banks)),
                lambda done: self._in_host_now(session, nbytes, done),
            )
            return True
        if self.disk is None or self.records is None:
            return False
        self._spill_to_disk(session, spans, tokens, banks)
        return True

    def _spill_to_disk(self, session: Session, spans: list[Span], tokens: int, banks: Banks) -> None:
        records, frozen = self.records, self._freeze(session)
        assert records is not None
        session.moving = True

        def job() -> int:
            tensors = {**records.kv_tensors(self._slabs, spans, tokens), **records.bank_tensors(banks)}
            return self._save(frozen, tensors)

        self.worker.submit(job, lambda done: self._saved(session, frozen, done))

    def _in_host_now(self, session: Session, nbytes: int, done: Future[tuple[HostState, float]]) -> None:
        self._reserved -= nbytes
        session.moving = False
        self.store.release(session)
        if (error := done.exception()) is not None:
            self._say_failure(session, "spilling to host memory", error)
            return
        state, seconds = done.result()
        if session.deleted:
            return
        session.host = state
        self._in_host[id(session)] = session
        self._count_spill(nbytes, seconds)

    def _freeze(self, session: Session) -> _Frozen:
        """What a save needs of a session, as it is now."""
        assert self.records is not None
        assert self.disk is not None
        needs_log = session.saved != session.generation
        return _Frozen(
            owner=self._owner(session),
            log=list(session.log) if needs_log else None,
            origin=session.origin,
            meta=self.records.metadata(session),
        )

    def _save(self, frozen: _Frozen, state: dict[str, Tensor] | None) -> int:
        """In the worker: write a session at rest; returns bytes."""
        assert self.records is not None
        assert self.disk is not None
        started = time.monotonic()
        log = self.records.log_tensors(frozen.log, frozen.origin) if frozen.log is not None else None
        owner = frozen.owner
        owner.about["saved"] = owner.generation
        if state is not None:
            owner.about["stored"] = owner.about["tokens"]
        self.disk.save(owner, log, state, frozen.meta)
        frozen.seconds = time.monotonic() - started
        return sum(tensor.nbytes for tensor in (state or {}).values())

    def _saved(self, session: Session, frozen: _Frozen, done: Future[int]) -> None:
        session.moving = False
        self.store.release(session)
        if (error := done.exception()) is not None:
            self._say_failure(session, "writing to the session directory", error)
            return
        if session.deleted or session.generation != frozen.owner.generation:
            return
        session.saved, session.foreign = session.generation, False
        if done.result():
            session.stored = len(session.context) if not session.stub else session.num_tokens
            self._count_spill(done.result(), frozen.seconds)

    def spill_log(self, session: Session) -> bool:
        """Write an idle session out whole and give its log's memory back. False where there is no disk."""
        if self.disk is None or self.records is None:
            return False
        on_disk = session.stored is not None or (session.table is None and session.host is None)
        if session.saved == session.generation and on_disk:
            self.store.release(session)
            self.store.take_log_out(session)
            return True
        if session.table is not None and session.stored is None and len(session.context):
            self._spill_to_disk(session, _spans(session.table), len(session.context), self._banks(session))
        elif session.host is not None:
            self._leave_host(session)
        else:
            self._save_log(session)
        return True

    def _save_log(self, session: Session) -> None:
        frozen = self._freeze(session)
        session.moving = True
        self.worker.submit(lambda: self._save(frozen, None), lambda done: self._saved(session, frozen, done))

    # -- up ------------------------------------------------------------------------------------------------

    def stored_tokens(self, session: Session) -> int | None:
        """Tokens of KV that :meth:`restore` would bring back, None where there is nothing to bring."""
        if session.is_resident or session.moving or session.stub:
            return None
        return session.host.tokens if session.host is not None else session.stored

    def restore(self, session: Session) -> None:
        """Start bringing KV and banks back; blocks and a row must be free."""
        tokens = self.stored_tokens(session)
        assert tokens is not None
        table = KVTable(self._allocator.allocate(blocks_for(tokens)))
        row = self._pool.take() if self._pool is not None else None
        self.store.put(session, table, row)
        session.moving = session.loading = session.wanted = True
        spans, banks, state = _spans(table), self._banks(session), session.host
        key, generation = session.key, session.generation

        def job() -> int:
            if state is not None:
                upload(state, self._slabs, spans, banks)
                return state.nbytes
            assert self.disk is not None
            assert self.records is not None
            with self.disk.parse(key, STATE) as parsed:
                size = sum(tensor.nbytes for tensor in parsed.tensors.values())
                self.records.fill(parsed, self.disk.secret, generation, tokens, spans, banks)
                parsed.tensors.clear()
            return size

        self.worker.submit(lambda: _timed(job), lambda done: self._restored(session, done))

    def _restored(self, session: Session, done: Future[tuple[int, float]]) -> None:
        session.moving = session.loading = False
        self._free(session)
        if (error := done.exception()) is not None:
            self.store.drop(session)
            self.stats.refused += isinstance(error, SnapshotRefused)
            session.note = f"{STATE} was refused: {error}"
            self._say_failure(session, "restoring", error)
            return
        if session.deleted:
            self.store.drop(session)
            return
        session.found = "restored"
        nbytes, seconds = done.result()
        self.stats.restores += 1
        self.stats.restored_bytes += nbytes
        self.stats.restore_seconds += seconds

    # -- commits, deletes ----------------------------------------------------------------------------------

    def record(self, session: Session, turn: Turn, row: int | None, then) -> None:
        """Have the disk take note of a commit, with its log where commits are synced; ``then`` gets the future."""
        assert self.disk is not None
        assert self.records is not None
        disk, records = self.disk, self.records
        expected = (session.epoch, session.generation)
        owner = self._owner(session)
        owner.generation += 1
        owner.about |= {"stored": None, "saved": owner.generation if disk.sync else session.saved}
        owner.about |= {"tokens": turn.end, "commits": session.commits + 1}
        meta = {
            **records.metadata(session, owner.generation),
            "tokens": str(turn.end),
            "commits": str(session.commits + 1),
        }
        log, origin = [*session.log, turn], session.origin
        if self.store.will_fold(session, turn):
            log, meta["folds"], owner.about["tokens"] = [], str(session.folds + 1), 0
            origin = copy_banks(self._pool.banks(row)) if self._pool is not None and row is not None else None

        def job() -> None:
            disk.record(owner, expected, records.log_tensors(log, origin) if disk.sync else None, meta)

        self.worker.submit(job, then)

    def save_log(self, session: Session, *, before: int) -> Future[None]:
        """Have the disk take note of a session that was emptied or replaced, with its log."""
        assert self.disk is not None
        assert self.records is not None
        disk, records, owner = self.disk, self.records, self._owner(session)
        log, origin, meta = list(session.log), session.origin, records.metadata(session)
        owner.about |= {"stored": None, "saved": owner.generation}
        expected = (session.epoch, before)
        session.moving = True

        def then(done: Future[None]) -> None:
            session.moving = False
            if session.deleted:
                self.store.drop(session)
            elif done.exception() is None:
                session.saved, session.foreign = session.generation, False
            elif isinstance(done.exception(), SessionConflict):
                self.store.remove(session)

        return self.worker.submit(lambda: disk.record(owner, expected, records.log_tensors(log, origin), meta), then)

    def recorded(self, session: Session) -> None:
        """After the commit: what of it is on disk."""
        if self.disk is not None and self.disk.sync:
            session.saved, session.foreign = session.generation, False

    def bury(self, key: Key, *, expired: bool = False, then=lambda done: None) -> Future[bool] | None:
        """Leave a tombstone on disk."""
        disk = self.disk
        self.openings.forget(key)
        return None if disk is None else self.worker.submit(lambda: disk.delete(key, expired=expired), then)

    def save_all(self) -> None:
        """Write every session that is not on disk yet, and wait for it."""
        self.worker.finish()
        if self.disk is None or self.records is None:
            return
        for session in self.store:
            if session.stub or session.deleted or not (session.commits or session.kept):
                continue
            if session.table is not None and session.stored is None and len(session.context):
                self._spill_to_disk(session, _spans(session.table), len(session.context), self._banks(session))
            elif session.host is not None:
                self._leave_host(session)
            elif session.saved != session.generation:
                self._save_log(session)
        self.worker.finish()

    def _owner(self, session: Session) -> Owner:
        assert self.disk is not None
        assert self.records is not None
        return Owner(
            *session.key, self.disk.server, session.epoch, session.generation, about=self.records.about(session)
        )

    def _banks(self, session: Session) -> Banks:
        return self._pool.banks(session.row) if self._pool is not None and session.row is not None else {}

    def _forgotten(self, session: Session) -> None:
        if not session.moving:
            self._free(session)
        self._in_host.pop(id(session), None)

    def _free(self, session: Session) -> None:
        """Let a session's copy in host memory go; a gigabyte takes the system a tenth of a second, so elsewhere."""
        state, session.host = session.host, None
        if state is not None:
            self.worker.submit(state.clear, lambda done: None)

    def _count_spill(self, nbytes: int, seconds: float) -> None:
        self.stats.spills += 1
        self.stats.spilled_bytes += nbytes
        self.stats.spill_seconds += seconds

    def _say_failure(self, session: Session, what: str, error: BaseException) -> None:
        self.stats.failures += 1
        logger.warning("session %r of tenant %r: %s failed: %s", session.key[1], session.key[0], what, str(error))


@dataclass
class _Frozen:
    """A session at rest, as a save takes it."""

    owner: Owner
    log: list[Turn] | None
    origin: Banks | None
    meta: dict[str, str]
    seconds: float = 0.0


def _spans(table: KVTable) -> list[Span]:
    return [Span(run.start, run.slot, run.length) for run in table.runs()]


def _timed(job):
    started = time.monotonic()
    result = job()
    return result, time.monotonic() - started
