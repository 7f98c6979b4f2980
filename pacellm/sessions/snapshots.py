"""Sessions as bytes that travel: signed, capped in size, checked before anything is touched."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from pacellm.errors import RequestError, SessionNotFound, SnapshotRefused
from pacellm.kv.blocks import KVTable, blocks_for
from pacellm.memory.state import copy_banks
from pacellm.sessions import format as snapshot
from pacellm.sessions.host import HostState, Span, download
from pacellm.sessions.operations import WAIT, Operation, SessionOps
from pacellm.sessions.session import Key, Session
from pacellm.sessions.store import context_of

if TYPE_CHECKING:
    from pacellm.engine.engine import Engine


class SnapshotOps:
    """Export and import of an engine's sessions.

    Args:
        engine: whose sessions.
        ops: finds them and tells when they are written.
    """

    def __init__(self, engine: Engine, ops: SessionOps) -> None:
        self._engine, self._ops, self._store = engine, ops, engine.sessions
        disk = engine.mover.disk
        self._secret = disk.secret if disk is not None else os.urandom(32)

    def export(self, key: Key, *, kv: bool, limit: int) -> Operation:
        """A session's last commit as signed bytes: log and banks, and KV where asked.

        Raises (when run or in the future):
            SessionNotFound: there is none. RequestError: it is larger than ``limit`` bytes.
        Raises:
            RequestError: the model is split over ranks.
        """
        self._refuse_parts()
        find = self._ops.finder(key)

        def operation() -> Any:
            session = find()
            if session is None or session.moving or self._ops.restoring(session):
                return WAIT
            records, log, origin = self._engine.records, list(session.log), session.origin
            metadata = records.metadata(session)
            metadata.pop("keep_foreign", None)
            metadata["tenant"] = key[0]
            state = self._state_of(session, kv=kv)
            size = session.log_bytes + (state.nbytes if state is not None else 0)
            if size > limit:
                raise RequestError(f"the snapshot would have {size:,} bytes; the limit is {limit:,}", param="kv")

            def job() -> bytes:
                tensors = records.log_tensors(log, origin)
                if state is not None:
                    tensors |= records.host_tensors(state)
                file = io.BytesIO()
                snapshot.write(file, tensors, metadata, self._secret, sums=False)
                return file.getvalue()

            return self._engine.worker.submit(job, lambda done: None)

        return operation

    def _refuse_parts(self) -> None:
        if self._engine.model.ranks is not None:
            raise RequestError("session snapshots are not there with --tensor-parallel-size", param="session_id")

    def _state_of(self, session: Session, *, kv: bool) -> HostState | None:
        """A copy of a resident session's banks, and KV where asked; None where only the log is left."""
        if not session.is_resident or session.table is None:
            return None
        pool = self._engine.pool
        banks = pool.banks(session.row) if pool is not None and session.row is not None else {}
        if not kv:
            return HostState([], copy_banks(banks), len(session.context))
        spans = [Span(run.start, run.slot, run.length) for run in session.table.runs()]
        return download(self._engine.runner.slabs, spans, len(session.context), banks)

    def check(self, data: bytearray, *, trust_unsigned: bool, tenant: str | None = None) -> dict[str, Any]:
        """Read a snapshot; any thread may call this. What it returns goes to :meth:`put`.

        Args:
            trust_unsigned: accept any signature.
            tenant: of whose sessions it must have been made; None takes all.

        Raises:
            SnapshotRefused: says why. RequestError: the model is split over ranks.
        """
        self._refuse_parts()
        records = self._engine.records
        tensors, metadata = snapshot.read(memoryview(data), self._secret, trust_unsigned=trust_unsigned, whole=True)
        if tenant is not None and metadata.get("tenant") != tenant:
            raise SnapshotRefused(
                "snapshot was not made of one of this tenant's sessions (or by an earlier version); a server with "
                "--share-snapshots takes it"
            )
        log, origin = records.take_log(tensors, metadata)
        facts = records.facts(metadata)
        banks = snapshot.take_banks("bank", tensors, records.like)
        context = context_of(log)
        strange = [name for name in tensors if not name.startswith("kv.")]
        if strange:
            raise SnapshotRefused(f"snapshot has an entry {strange[0][:40]!r}")
        if tensors:
            records.check_kv(tensors, len(context))
        elif banks and context:
            banks = {}  # banks without KV would need a replay, which rebuilds them as well
        return {"log": log, "origin": origin, "facts": facts, "banks": banks, "kv": tensors, "data": data}

    def put(self, key: Key, checked: dict[str, Any], ttl: float | None) -> Operation:
        """Make a checked snapshot the session's state. What was there before is replaced at once, or stays.

        Raises (when run):
            RequestError: the session is in use.
        """
        find = self._ops.finder(key)

        def operation() -> Any:
            try:
                session = find()
                if session is None:
                    return WAIT
            except SessionNotFound:
                session = self._store.open(key)
            if session.busy or session.moving:
                return WAIT
            generation = session.generation
            self._store.reset(session)
            checked["facts"].give(session)
            session.generation, session.ttl = generation + 1, ttl if ttl is not None else session.ttl
            self._engine.forget_progress(key[0], key)
            self._store.put_log_in(session, checked["log"], checked["origin"])
            if checked["kv"]:
                self._fill(session, checked)
            return self._ops.written(session, self._ops.describe(session))

        return operation

    def _fill(self, session: Session, checked: dict[str, Any]) -> None:
        """Put a snapshot's KV and banks in place where there is room; else its log brings them back."""
        engine, tokens = self._engine, len(session.context)
        if not engine.scheduler.has_room(blocks_for(tokens)) or (engine.pool is not None and not engine.pool.num_free):
            return
        table = KVTable(engine.allocator.allocate(blocks_for(tokens)))
        row = engine.pool.take() if engine.pool is not None else None
        spans = [Span(run.start, run.slot, run.length) for run in table.runs()]
        banks = engine.pool.banks(row) if engine.pool is not None and row is not None else {}
        engine.records.place(checked["kv"], tokens, spans, checked["banks"], banks)
        self._store.put(session, table, row)
