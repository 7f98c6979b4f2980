"""Moves sessions between the device, host memory and disk, all off the step path.

The engine thread decides and owns all bookkeeping; the worker's thread copies and reads and writes files. What a job
touches (blocks, a row, a host copy) is held for it until its result is taken in the engine thread.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from functools import partial

from torch import Tensor

from pacellm.errors import SnapshotRefused, reason
from pacellm.kv.blocks import BlockAllocator, KVTable, blocks_for
from pacellm.kv.history import History
from pacellm.memory.pool import BankPool
from pacellm.memory.state import Banks, banks_nbytes
from pacellm.sessions.claims import DirectoryClaims
from pacellm.sessions.disk import STATE, Disk
from pacellm.sessions.files import SessionFiles, State
from pacellm.sessions.history_tier import HistoryTier
from pacellm.sessions.host_memory import HostMemory
from pacellm.sessions.host_state import HostState, download, spans_of, upload
from pacellm.sessions.session import Session
from pacellm.sessions.stats import MoverStats
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker
from pacellm.view import View

logger = logging.getLogger("pacellm.sessions")


class Mover:
    """Owns the tiers below the device.

    Args:
        store, allocator, pool: the sessions and the device's memory; pool is None without PA.
        slabs: KV memory.
        bytes_per_token: of KV over all layers.
        worker: runs the jobs.
        host: the tier in host memory.
        claims: ask the session directory.
        files: sessions' files there; None where there is none.
        stats: where moves are counted.
    """

    def __init__(
        self,
        store: SessionStore,
        allocator: BlockAllocator,
        pool: BankPool | None,
        slabs: list[Tensor],
        *,
        bytes_per_token: int,
        worker: Worker,
        host: HostMemory,
        claims: DirectoryClaims,
        files: SessionFiles | None,
        stats: MoverStats,
    ) -> None:
        self._store, self._allocator, self._pool, self._slabs = store, allocator, pool, slabs
        self._bytes_per_token, self._worker = bytes_per_token, worker
        self.host, self.claims, self.files, self.stats = host, claims, files, stats
        self.histories = HistoryTier(host, worker, files, stats)

    @property
    def disk(self) -> Disk | None:
        """The session directory."""
        return None if self.files is None else self.files.disk

    @property
    def is_busy(self) -> bool:
        """A job's result was not taken yet."""
        return self._worker.num_open > 0

    # -- host memory ---------------------------------------------------------------------------------------

    def _make_host_room(self, wanted: int) -> bool:
        """Room for ``wanted`` bytes, made before it is used: by jobs that run before the one that needs it."""
        if wanted > self.host.capacity:
            return False
        self.histories.write_out(self.host.missing(wanted))
        idle = self.host.idle()
        while idle and not self.host.has_room(wanted):
            self._leave_host(idle.pop(0))
        return self.host.has_room(wanted)

    def _leave_host(self, session: Session) -> None:
        state, session.host = session.host, None
        if state is None:
            return
        if self.files is None or session.deleted or not self.files.has_room(state.nbytes, state.history):
            state.clear()
            return
        records = self.files.records
        tensors = partial(records.host_tensors, state)
        self.files.save(session, State(state.tokens, state.history, tensors, free=state.clear))

    # -- down ----------------------------------------------------------------------------------------------

    def spill(self, session: Session) -> bool:
        """Take an idle session's KV and banks off the device. False where there is no tier for them."""
        if session.table is None or session.moving or session.deleted:
            return False
        if session.stored is not None:
            self._store.release(session)  # the disk has this generation already
            return True
        tokens, banks, table = session.kv_tokens, self._banks(session), session.table
        if not tokens:
            return False
        nbytes = tokens * self._bytes_per_token + banks_nbytes(banks)
        spans = spans_of(table)
        if self._make_host_room(nbytes):
            self.host.reserve(nbytes)
            session.moving = True
            self._worker.submit(
                lambda: _timed(lambda: _with_history(download(self._slabs, spans, tokens, banks), table)),
                lambda done: self._in_host_now(session, nbytes, done),
            )
            return True
        if self.files is None or not self.files.has_room(nbytes, table.history):
            return False
        self._spill_to_disk(session, table, self.files)
        return True

    def _spill_to_disk(self, session: Session, table: KVTable, files: SessionFiles) -> None:
        spans, tokens, banks = spans_of(table), session.kv_tokens, self._banks(session)

        def tensors() -> dict[str, Tensor]:
            return {**files.records.kv_tensors(self._slabs, spans, tokens), **files.records.bank_tensors(banks)}

        files.save(session, State(tokens, table.history.until(table.view.start), tensors))

    def _in_host_now(self, session: Session, nbytes: int, done: Future[tuple[HostState, float]]) -> None:
        self.host.arrived(nbytes)
        session.moving = False
        self._store.release(session)
        if (error := done.exception()) is not None:
            self.stats.say_failure(session.key, "spilling to host memory", error)
            return
        state, seconds = done.result()
        if session.deleted:
            return
        self.host.put(session, state)
        self.stats.count_spill(nbytes, seconds)

    def spill_log(self, session: Session) -> bool:
        """Write an idle session out whole and give its log's memory back. False where there is no disk."""
        if self.files is None:
            return False
        on_disk = session.stored is not None or (session.table is None and session.host is None)
        if session.saved == session.generation and on_disk:
            self._store.release(session)
            self._store.take_log_out(session)
        else:
            self._save(session, self.files)
        return True

    def _save(self, session: Session, files: SessionFiles) -> None:
        """Write an idle session: its log, and the state where there is one that is not on disk and has room there."""
        table, tokens = session.table, session.kv_tokens
        if table is not None and session.stored is None and tokens:
            nbytes = tokens * self._bytes_per_token + banks_nbytes(self._banks(session))
            if files.has_room(nbytes, table.history):
                self._spill_to_disk(session, table, files)
                return
            self._store.release(session)
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
        start = len(session.context) - tokens
        table = KVTable(self._allocator.allocate(blocks_for(tokens)), View(start))
        row = self._pool.take() if self._pool is not None else None
        self._store.put(session, table, row)
        session.moving = session.loading = session.wanted = True
        spans, banks, state = spans_of(table), self._banks(session), session.host
        key, generation, files = session.key, session.generation, self.files

        def job() -> tuple[int, History]:
            if state is not None:
                upload(state, self._slabs, spans, banks)
                return state.nbytes, state.history.until(start)
            assert files is not None
            with files.disk.parse(key, STATE) as parsed:
                size = sum(tensor.nbytes for tensor in parsed.tensors.values())
                listing = files.records.fill(parsed, files.disk.secret, generation, start, tokens, spans, banks)
                history = files.disk.histories.take(files.disk.folder(key), listing, self._slabs)
                parsed.tensors.clear()
            return size, history

        self._worker.submit(lambda: _timed(job), lambda done: self._restored(session, table, done))

    def _restored(self, session: Session, table: KVTable, done: Future[tuple[tuple[int, History], float]]) -> None:
        session.moving = session.loading = False
        self.host.free(session)
        if (error := done.exception()) is not None:
            self._store.drop(session)
            self.stats.refused += isinstance(error, SnapshotRefused)
            session.note = f"{STATE} was refused: {reason(error)}"
            self.stats.say_failure(session.key, "restoring", error)
            return
        if session.deleted:
            self._store.drop(session)
            return
        session.found = "restored"
        (nbytes, table.history), seconds = done.result()
        self.stats.restores += 1
        self.stats.restored_bytes += nbytes
        self.stats.restore_seconds += seconds

    def save_all(self) -> None:
        """Write every session that is not on disk yet, and wait for it."""
        self._worker.finish()
        if self.files is None:
            return
        for session in self._store:
            if session.stub or session.deleted or not (session.commits or session.kept):
                continue
            try:
                self._save(session, self.files)
            except Exception as error:  # the others are written all the same
                self.stats.say_failure(session.key, "writing at the end", error)
        self._worker.submit(self.files.disk.retry, lambda done: None)
        self._worker.finish()

    def _banks(self, session: Session) -> Banks:
        return self._pool.banks(session.row) if self._pool is not None and session.row is not None else {}


def _with_history(state: HostState, table: KVTable) -> HostState:
    state.history = table.history.until(table.view.start)
    return state


def _timed(job):
    started = time.monotonic()
    result = job()
    return result, time.monotonic() - started
