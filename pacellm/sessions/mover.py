"""Moves sessions between the device, host memory and disk, all off the step path.

The engine thread decides and owns all bookkeeping; the worker's thread copies and reads and writes files. What a job
touches (blocks, a row, a host copy) is held for it until its result is taken in the engine thread.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future

from torch import Tensor

from pacellm.errors import SnapshotRefused, reason
from pacellm.kv.blocks import BlockAllocator, KVTable, blocks_for
from pacellm.memory.pool import BankPool
from pacellm.memory.state import Banks, banks_nbytes
from pacellm.sessions.claims import Openings
from pacellm.sessions.disk import STATE, Disk
from pacellm.sessions.files import SessionFiles
from pacellm.sessions.host import HostState, Span, download, upload
from pacellm.sessions.records import Records
from pacellm.sessions.session import Session
from pacellm.sessions.stats import MoverStats
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker

logger = logging.getLogger("pacellm.sessions")


class Mover:
    """Owns the tiers below the device.

    Args:
        store, allocator, pool: the engine's.
        slabs: KV memory.
        worker: runs the jobs.
        host_memory: bytes of KV and banks to keep in host memory.
        disk, records: the session directory and how sessions are written there, or None.
        disk_size: bytes of files in it; None is no limit.
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
        disk_size: int | None = None,
        bytes_per_token: int,
    ) -> None:
        self.store, self._allocator, self._pool, self._slabs = store, allocator, pool, slabs
        self.worker, self.host_memory = worker, host_memory
        self._bytes_per_token = bytes_per_token
        self._in_host: dict[int, Session] = {}
        self._reserved = 0  # bytes of host copies that are being made
        self.openings = Openings(store, worker, disk, records)
        self.stats = MoverStats()
        self.files: SessionFiles | None = None
        if disk is not None and records is not None:
            self.files = SessionFiles(store, self.openings, worker, disk, records, disk_size, self.stats)
        store.spill, store.spill_log, store.forgotten = self.spill, self.spill_log, self._forgotten

    @property
    def disk(self) -> Disk | None:
        """The session directory."""
        return None if self.files is None else self.files.disk

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
        if self.files is None or session.deleted or not self.files.budget.has_room(state.nbytes):
            state.clear()
            return
        records = self.files.records
        self.files.save(session, lambda: records.host_tensors(state), free=state.clear)

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
        if self.files is None or not self.files.budget.has_room(nbytes):
            return False
        self._spill_to_disk(session, self.files)
        return True

    def _spill_to_disk(self, session: Session, files: SessionFiles) -> None:
        assert session.table is not None
        spans, tokens, banks = _spans(session.table), len(session.context), self._banks(session)

        def tensors() -> dict[str, Tensor]:
            return {**files.records.kv_tensors(self._slabs, spans, tokens), **files.records.bank_tensors(banks)}

        files.save(session, tensors)

    def _in_host_now(self, session: Session, nbytes: int, done: Future[tuple[HostState, float]]) -> None:
        self._reserved -= nbytes
        session.moving = False
        self.store.release(session)
        if (error := done.exception()) is not None:
            self.stats.say_failure(session.key, "spilling to host memory", error)
            return
        state, seconds = done.result()
        if session.deleted:
            return
        session.host = state
        self._in_host[id(session)] = session
        self.stats.count_spill(nbytes, seconds)

    def spill_log(self, session: Session) -> bool:
        """Write an idle session out whole and give its log's memory back. False where there is no disk."""
        if self.files is None:
            return False
        on_disk = session.stored is not None or (session.table is None and session.host is None)
        if session.saved == session.generation and on_disk:
            self.store.release(session)
            self.store.take_log_out(session)
        else:
            self._save(session, self.files)
        return True

    def _save(self, session: Session, files: SessionFiles) -> None:
        """Write an idle session: its log, and the state where there is one that is not on disk and has room there."""
        if session.table is not None and session.stored is None and len(session.context):
            if files.budget.has_room(len(session.context) * self._bytes_per_token + banks_nbytes(self._banks(session))):
                self._spill_to_disk(session, files)
                return
            self.store.release(session)
        elif session.host is not None:
            self._leave_host(session)
        if session.saved != session.generation and not session.moving:
            files.save(session)

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
        key, generation, files = session.key, session.generation, self.files

        def job() -> int:
            if state is not None:
                upload(state, self._slabs, spans, banks)
                return state.nbytes
            assert files is not None
            with files.disk.parse(key, STATE) as parsed:
                size = sum(tensor.nbytes for tensor in parsed.tensors.values())
                files.records.fill(parsed, files.disk.secret, generation, tokens, spans, banks)
                parsed.tensors.clear()
            return size

        self.worker.submit(lambda: _timed(job), lambda done: self._restored(session, done))

    def _restored(self, session: Session, done: Future[tuple[int, float]]) -> None:
        session.moving = session.loading = False
        self._free(session)
        if (error := done.exception()) is not None:
            self.store.drop(session)
            self.stats.refused += isinstance(error, SnapshotRefused)
            session.note = f"{STATE} was refused: {reason(error)}"
            self.stats.say_failure(session.key, "restoring", error)
            return
        if session.deleted:
            self.store.drop(session)
            return
        session.found = "restored"
        nbytes, seconds = done.result()
        self.stats.restores += 1
        self.stats.restored_bytes += nbytes
        self.stats.restore_seconds += seconds

    def save_all(self) -> None:
        """Write every session that is not on disk yet, and wait for it."""
        self.worker.finish()
        if self.files is None:
            return
        for session in self.store:
            if session.stub or session.deleted or not (session.commits or session.kept):
                continue
            try:
                self._save(session, self.files)
            except Exception as error:  # the others are written all the same
                self.stats.say_failure(session.key, "writing at the end", error)
        self.worker.submit(self.files.disk.retry, lambda done: None)
        self.worker.finish()

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


def _spans(table: KVTable) -> list[Span]:
    return [Span(run.start, run.slot, run.length) for run in table.runs()]


def _timed(job):
    started = time.monotonic()
    result = job()
    return result, time.monotonic() - started
