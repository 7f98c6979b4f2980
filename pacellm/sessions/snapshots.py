"""Sessions as bytes that travel: signed, capped in size, checked before anything is touched."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

from pacellm.errors import RequestError, SessionNotFound, SnapshotRefused
from pacellm.kv.prefix_cache import PrefixCache
from pacellm.sessions import format as snapshot
from pacellm.sessions.device_state import DeviceState
from pacellm.sessions.lookup import SessionLookup
from pacellm.sessions.metadata import SessionMetadata
from pacellm.sessions.operation_queue import WAIT, Operation
from pacellm.sessions.operations import SessionOperations
from pacellm.sessions.records import Records
from pacellm.sessions.session import Key, Session
from pacellm.sessions.store import SessionStore, context_of
from pacellm.sessions.worker import Worker


class Snapshots:
    """Export and import of an engine's sessions.

    Args:
        store: the sessions. lookup: finds them. metadata: what is shown of them.
        states: their KV and banks on the device.
        operations: tell when a changed session is written.
        prefix_cache: forgets what was computed for a session that is replaced.
        worker: writes snapshots.
        records: gives how sessions of this model are written, asked when first needed; None where they are not, as of
            a model that is split over ranks.
        secret: key of the signatures; None makes one for this process.
    """

    def __init__(
        self,
        store: SessionStore,
        lookup: SessionLookup,
        metadata: SessionMetadata,
        states: DeviceState,
        operations: SessionOperations,
        prefix_cache: PrefixCache,
        worker: Worker,
        records: Callable[[], Records] | None,
        secret: bytes | None,
    ) -> None:
        self._store, self._lookup, self._metadata, self._states = store, lookup, metadata, states
        self._operations, self._prefix_cache, self._worker, self._records = operations, prefix_cache, worker, records
        self._secret = secret if secret is not None else os.urandom(32)

    def export(self, key: Key, *, kv: bool, limit: int) -> Operation:
        """A session's last commit as signed bytes: log and banks, and KV where asked.

        Raises (when run or in the future):
            SessionNotFound: there is none. RequestError: it is larger than ``limit`` bytes.
        Raises:
            RequestError: the model is split over ranks.
        """
        get_records = self._get_records()
        find = self._lookup.finder(key)

        def operation() -> Any:
            session = find()
            if session is None or session.moving or self._states.is_coming(session):
                return WAIT
            records = get_records()
            log, origin = list(session.log), session.origin
            metadata = records.metadata(session)
            metadata.pop("keep_foreign", None)
            metadata["tenant"] = key[0]
            state = self._states.copy_out(session, kv=kv)
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

            return self._worker.submit(job, lambda done: None)

        return operation

    def _get_records(self) -> Callable[[], Records]:
        if self._records is None:
            raise RequestError("session snapshots are not there with --tensor-parallel-size", param="session_id")
        return self._records

    def check(self, data: bytearray, *, trust_unsigned: bool, tenant: str | None = None) -> dict[str, Any]:
        """Read a snapshot; any thread may call this. What it returns goes to :meth:`put`.

        Args:
            trust_unsigned: accept any signature.
            tenant: of whose sessions it must have been made; None takes all.

        Raises:
            SnapshotRefused: says why. RequestError: the model is split over ranks.
        """
        records = self._get_records()()
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
        if tensors and not records.has_codes_of(metadata):
            tensors, banks = {}, {}  # the log brings them back
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
        find = self._lookup.finder(key)

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
            self._prefix_cache.forget_session(key, made=True)
            self._store.put_log_in(session, checked["log"], checked["origin"])
            if checked["kv"]:
                self._fill(session, checked)
            return self._operations.written(session, self._metadata.of(session))

        return operation

    def _fill(self, session: Session, checked: dict[str, Any]) -> None:
        records = self._get_records()()
        self._states.fill(
            session,
            lambda tokens, spans, banks: records.place(checked["kv"], tokens, spans, checked["banks"], banks),
        )
