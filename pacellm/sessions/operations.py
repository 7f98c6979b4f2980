"""What clients do to sessions as things: list, show, create, delete, reset, fork."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pacellm.errors import BanksAway, SessionNotFound
from pacellm.kv.prefix_cache import PrefixCache
from pacellm.memory.bank_map import copy_bank
from pacellm.sessions.device_state import DeviceState
from pacellm.sessions.eviction import Eviction
from pacellm.sessions.lookup import SessionLookup
from pacellm.sessions.metadata import SessionMetadata
from pacellm.sessions.mover import Mover
from pacellm.sessions.operation_queue import WAIT, Operation, pass_on
from pacellm.sessions.session import Key, Session
from pacellm.sessions.store import SessionStore


class SessionOperations:
    """Operations on an engine's sessions. Making one touches nothing, so any thread may; they run in the engine thread.

    Args:
        store: the sessions. mover: the tiers below.
        lookup: finds them. metadata: what is shown of them.
        states: their KV and banks on the device. eviction: keeps them within their budgets.
        prefix_cache: forgets what was computed for a session that goes.
        end_requests: ends whatever waits for a session or works on it.
    """

    def __init__(
        self,
        store: SessionStore,
        mover: Mover,
        lookup: SessionLookup,
        metadata: SessionMetadata,
        states: DeviceState,
        eviction: Eviction,
        prefix_cache: PrefixCache,
        end_requests: Callable[[Key], None],
    ) -> None:
        self._store, self._mover, self._lookup, self._metadata = store, mover, lookup, metadata
        self._states, self._eviction = states, eviction
        self._prefix_cache, self._end_requests = prefix_cache, end_requests

    # -- looking -------------------------------------------------------------------------------------------

    def show(self, key: Key) -> Operation:
        """Metadata of one session."""
        find = self._lookup.finder(key)

        def operation() -> Any:
            session = find()
            return WAIT if session is None else self._metadata.of(session)

        return operation

    def context(self, key: Key) -> Operation:
        """The ids that a session stands for; none where there is no such session."""
        find = self._lookup.finder(key)

        def operation() -> Any:
            try:
                session = find()
            except SessionNotFound:
                return array("i")
            return WAIT if session is None else array("i", session.context)

        return operation

    def bank(self, key: Key, layer: int) -> Operation:
        """(copy of a layer's bank for :func:`map_bank`, the log's turns, writes before the first of them); None where
        nothing was committed yet.

        Raises (when run):
            SessionNotFound: no such session. BanksAway: they are not in memory.
        """
        find = self._lookup.finder(key)

        def operation() -> Any:
            session = find()
            if session is None or session.moving:
                return WAIT
            bank = self._states.bank(session, layer)
            if bank is None and not session.commits:
                return None
            if bank is None:
                raise BanksAway(
                    f"the banks of session {key[1]!r} are not in memory (it is on tier {session.tier!r}, with "
                    f"{session.commits} commits); they are again after its next request",
                    param="session_id",
                )
            clock = 0 if session.origin is None else int(session.origin[layer].clock)
            return copy_bank(bank), tuple(session.log), clock

        return operation

    def list(self, tenant: str, *, limit: int | None = None, after: str | None = None) -> Operation:
        """Metadata of a tenant's sessions, most recently used first.

        Args:
            limit: how many at most.
            after: the id that the page before ended with.

        Raises (when run):
            SessionNotFound: that one is gone.
        """

        def operation() -> Any:
            found = self._store.of(tenant)
            ids = [] if after is None else [session.key[1] for session in found]
            if after is not None and after not in ids:
                raise SessionNotFound(f"no session {after!r} to list from", param="after")
            start = 0 if after is None else ids.index(after) + 1
            shown = (session for session in found[start:] if session.commits or session.kept)
            return [self._metadata.of(session, ranks=False) for session in itertools.islice(shown, limit)]

        return operation

    # -- changing ------------------------------------------------------------------------------------------

    def create(self, key: Key, ttl: float | None) -> Operation:
        """An empty session.

        Raises (when run):
            SessionExists: it is there already.
        """
        absent = self._lookup.absence(key)

        def operation() -> Any:
            if not absent():
                return WAIT
            session = self._store.open(key)
            session.kept, session.status = True, "new"
            session.ttl = ttl if ttl is not None else session.ttl
            return self._metadata.of(session)

        return operation

    def delete(self, key: Key) -> Operation:
        """Delete a session wherever it is; its requests end with an error.

        Raises (when run or in the future):
            SessionNotFound: there is none.
        """

        was_there = False

        def told(found: tuple[Any, bool]) -> dict[str, Any]:
            there, is_durable = found
            return _found(key, bool(there) or was_there or not is_durable, is_durable=is_durable)

        def operation() -> Any:
            nonlocal was_there
            session = self._store.get(key)
            was_there = session is not None and bool(session.commits or session.kept or session.busy)
            self._end_requests(key)
            if session is not None:
                self._store.remove(session)
            self._prefix_cache.forget_session(key, made=True)
            files = self._mover.files
            if files is None:
                return _found(key, was_there)
            result: Future[Any] = Future()
            files.deletions.delete(key).add_done_callback(lambda done: pass_on(_durable(done), result, told))
            return result

        return operation

    def delete_all(self, tenant: str) -> Operation:
        """Delete all of a tenant's sessions and whatever else is kept of its requests: how many there were, and of how
        many the files are still to go."""

        def operation() -> Any:
            keys = {session.key for session in self._store.of(tenant)} | self._mover.claims.of(tenant)
            for key in keys:
                self._end_requests(key)
                session = self._store.get(key)
                if session is not None:
                    self._store.remove(session)
            self._prefix_cache.forget_tenant(tenant)
            files = self._mover.files
            return (len(keys), 0) if files is None else files.deletions.delete_all(tenant, keys)

        return operation

    def expire(self, session: Session) -> None:
        """A session's time has come."""
        if not session.moving:
            self._end_requests(session.key)
            self._store.remove(session, lost=bool(session.commits))
            self._prefix_cache.forget_session(session.key, made=True)
            if self._mover.files is not None:
                self._mover.files.deletions.delete(session.key, expired=bool(session.commits))

    def reset(self, key: Key) -> Operation:
        """Empty a session, after the request that works on it."""
        find = self._lookup.finder(key)

        def operation() -> Any:
            session = find()
            if session is None or session.busy or session.moving:
                return WAIT
            self._store.reset(session)
            self._store.touch(session)
            self._prefix_cache.forget_session(key, made=True)
            return self.written(session, self._metadata.of(session))

        return operation

    def written(self, session: Session, description: dict[str, Any]) -> Any:
        """The description, once the session's log is on disk where there is one; it says so where it could not be
        written, which is tried again when the session leaves memory."""
        files = self._mover.files
        if files is None:
            return description
        result: Future[Any] = Future()
        files.replace_log(session).add_done_callback(
            lambda done: pass_on(
                _durable(done), result, lambda found: description if found[1] else {**description, "durable": False}
            )
        )
        return result

    def fork(self, key: Key, target: Key, ttl: float | None) -> Operation:
        """A copy of a session's last commit: full KV blocks are shared, the last block and the banks copied.

        Raises (when run):
            SessionNotFound: no such source. SessionExists: the target is there.
        """
        find, absent = self._lookup.finder(key), self._lookup.absence(target)

        def operation() -> Any:
            source = find()
            if source is None or not absent():
                return WAIT
            if source.moving or self._states.is_coming(source):
                return WAIT
            fork = self._store.get(target) or Session(target)
            _copy_log(source, fork)
            fork.ttl = ttl if ttl is not None else source.ttl
            before = self._states.num_free_blocks
            self._states.share(source, fork)
            self._store.add(fork)
            self._store.touch(fork)
            added = (before - self._states.num_free_blocks) * self._metadata.block_bytes
            bytes_added = {"kv": added, "bank": self._metadata.bank_bytes(fork)}
            made = self.written(fork, {**self._metadata.of(fork), "bytes_added": bytes_added})
            self._eviction.trim()
            return made

        return operation


def _copy_log(source: Session, fork: Session) -> None:
    fork.log, fork.context = list(source.log), array("i", source.context)
    fork.origin, fork.folds, fork.commits = source.origin, source.folds, source.commits
    fork.ending = source.ending
    fork.banks, fork.kept, fork.status = dict(source.banks), True, "new"
    fork.ranks, fork.parent = dict(source.ranks), source.key[1]
    fork.num_tokens = len(fork.context)
    fork.generation += 1


def _found(key: Key, was_there: bool, *, is_durable: bool = True) -> dict[str, Any]:
    if not was_there:
        raise SessionNotFound(f"no session {key[1]!r}", param="session_id")
    told = {"id": key[1], "object": "session.deleted", "deleted": True}
    return told if is_durable else {**told, "durable": False}


def _durable(done: Future[Any]) -> Future[tuple[Any, bool]]:
    """(the result, whether the disk has it), of a job that wrote to the session directory."""
    told: Future[tuple[Any, bool]] = Future()
    error = done.exception()
    if error is None:
        told.set_result((done.result(), True))
    elif isinstance(error, OSError):
        told.set_result((None, False))
    else:
        told.set_exception(error)
    return told
