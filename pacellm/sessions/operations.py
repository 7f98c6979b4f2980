"""What clients do to sessions as things: list, show, create, delete, reset, fork, snapshot.

An operation is a function that the engine thread calls between steps until it returns something; until then it
waits for the worker or for the session's running request. Whoever asked holds a future.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from pacellm.errors import EngineError, PaceError, SessionExists, SessionNotFound, reason
from pacellm.faults import settle
from pacellm.kv.blocks import BLOCK, KVTable, OutOfBlocks, blocks_for
from pacellm.sessions.session import Key, Session

if TYPE_CHECKING:
    from pacellm.engine.engine import Engine

Operation = Callable[[], Any]
WAIT = object()  # returned by an operation that must be called again


class SessionOps:
    """Operations on an engine's sessions. All methods but :meth:`submit` run in the engine thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store, self._mover = engine.sessions, engine.mover
        self._waiting: list[tuple[Operation, Future[Any]]] = []

    @property
    def is_waiting(self) -> bool:
        """An operation has not ended."""
        return bool(self._waiting)

    def submit(self, operation: Operation, future: Future[Any] | None = None) -> Future[Any]:
        """Run an operation at the next step, and again until it ends."""
        future = future or Future()
        self._waiting.append((operation, future))
        return future

    def run(self) -> None:
        """Call every waiting operation once; one whose asker has given up is forgotten."""
        waiting, self._waiting = self._waiting, []
        for operation, future in waiting:
            if future.cancelled():
                continue
            try:
                result = operation()
            except PaceError as error:
                settle(future, error=error)
            except Exception as error:
                self._engine.faults.note("operation", error)
                settle(future, error=EngineError(f"the operation failed: {reason(error)}"))
            else:
                if result is WAIT:
                    self._waiting.append((operation, future))
                elif isinstance(result, Future):
                    _chain(result, future)
                else:
                    settle(future, result)

    def end(self, error: PaceError) -> None:
        """The engine has ended: nobody waits in silence."""
        for _, future in self._waiting:
            settle(future, error=error)
        self._waiting = []

    # -- finding -------------------------------------------------------------------------------------------

    def finder(self, key: Key) -> Callable[[], Session | None]:
        """Finds a session, after the disk was asked once; None while that takes its time.

        Raises (when called):
            SessionNotFound: there is none, or it is another tenant's. PaceError: the disk cannot tell.
        """
        openings, asked = self._mover.openings, self._mover.disk is None
        refused: list[PaceError] = []

        def find() -> Session | None:
            nonlocal asked
            if refused:
                raise refused[0]
            session = self._store.get(key)
            if not asked and (session is None or not session.busy):
                asked = True
                openings.open(key, refuse=refused.append)
            if openings.is_asking(key):
                return None
            session = self._store.get(key)
            if session is not None and session.stub:
                openings.open(key, refuse=refused.append)
                return None
            if session is None or not (session.commits or session.kept):
                raise SessionNotFound(f"no session {key[1]!r}", param="session_id")
            return session

        return find

    def show(self, key: Key) -> Operation:
        """Metadata of one session."""
        find = self.finder(key)

        def operation() -> Any:
            session = find()
            return WAIT if session is None else self.describe(session)

        return operation

    def context(self, key: Key) -> Operation:
        """The ids that a session stands for; none where there is no such session."""
        find = self.finder(key)

        def operation() -> Any:
            try:
                session = find()
            except SessionNotFound:
                return array("i")
            return WAIT if session is None else array("i", session.context)

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
            return [self.describe(session) for session in itertools.islice(shown, limit)]

        return operation

    def describe(self, session: Session) -> dict[str, Any]:
        """What a client may know of its session; nothing of its content."""
        pool = self._engine.pool
        bank_bytes = pool.bytes_per_row if pool is not None and session.row is not None else 0
        host = session.host
        return {
            "id": session.key[1],
            "object": "session",
            "created": int(session.created),
            "last_used": int(session.last_used),
            "expires": None if session.expires is None else int(session.expires),
            "ttl": session.ttl,
            "tokens": session.num_tokens if session.stub else len(session.context),
            "commits": session.commits,
            "generation": session.generation,
            "tier": session.tier,
            "in_use": session.busy,
            "bytes": {
                "kv": len(session.table.blocks) * self._engine.block_bytes if session.table is not None else 0,
                "bank": bank_bytes,
                "host": host.nbytes if host is not None else 0,
                "log": session.log_bytes,
            },
            "bank": {"slots": self._engine.config.bank.bank_size, "layers": _rates(session.banks)} if pool else None,
        }

    # -- changing ------------------------------------------------------------------------------------------

    def create(self, key: Key, ttl: float | None) -> Operation:
        """An empty session.

        Raises (when run):
            SessionExists: it is there already.
        """
        absent = self._absent(key)

        def operation() -> Any:
            if not absent():
                return WAIT
            session = self._store.open(key)
            session.kept, session.status = True, "new"
            session.ttl = ttl if ttl is not None else session.ttl
            return self.describe(session)

        return operation

    def _absent(self, key: Key) -> Callable[[], bool]:
        """True once it is certain that a session is not there.

        Raises (when called):
            SessionExists: it is.
        """
        find = self.finder(key)

        def absent() -> bool:
            session = self._store.get(key)
            if session is not None and session.busy:
                raise SessionExists(f"session {key[1]!r} exists", param="session_id")
            try:
                if find() is None:
                    return False
            except SessionNotFound:
                return True
            raise SessionExists(f"session {key[1]!r} exists", param="session_id")

        return absent

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
            self._engine.recovery.end_requests_of(key)
            if session is not None:
                self._store.remove(session)
            self._engine.forget_progress(key[0], key)
            files = self._mover.files
            if files is None:
                return _found(key, was_there)
            result: Future[Any] = Future()
            files.bury(key).add_done_callback(lambda done: _pass_on(_durable(done), result, told))
            return result

        return operation

    def delete_all(self, tenant: str) -> Operation:
        """Delete all of a tenant's sessions and whatever else is kept of its requests: how many there were, and of how
        many the files are still to go."""

        def operation() -> Any:
            keys = {session.key for session in self._store.of(tenant)} | self._mover.openings.of(tenant)
            for key in keys:
                self._engine.recovery.end_requests_of(key)
                session = self._store.get(key)
                if session is not None:
                    self._store.remove(session)
            self._engine.forget_progress(tenant)
            files = self._mover.files
            return (len(keys), 0) if files is None else files.bury_all(tenant, keys)

        return operation

    def expire(self, session: Session) -> None:
        """A session's time has come."""
        if not session.moving:
            self._engine.recovery.end_requests_of(session.key)
            self._store.remove(session, lost=bool(session.commits))
            self._engine.forget_progress(session.key[0], session.key)
            if self._mover.files is not None:
                self._mover.files.bury(session.key, expired=bool(session.commits))

    def reset(self, key: Key) -> Operation:
        """Empty a session, after the request that works on it."""
        find = self.finder(key)

        def operation() -> Any:
            session = find()
            if session is None or session.busy or session.moving:
                return WAIT
            self._store.reset(session)
            self._store.touch(session)
            self._engine.forget_progress(key[0], key)
            return self.written(session, self.describe(session))

        return operation

    def written(self, session: Session, description: dict[str, Any]) -> Any:
        """The description, once the session's log is on disk where there is one; it says so where it could not be
        written, which is tried again when the session leaves memory."""
        files = self._mover.files
        if files is None:
            return description
        result: Future[Any] = Future()
        files.replace_log(session).add_done_callback(
            lambda done: _pass_on(
                _durable(done), result, lambda found: description if found[1] else {**description, "durable": False}
            )
        )
        return result

    def fork(self, key: Key, target: Key, ttl: float | None) -> Operation:
        """A copy of a session's last commit: full KV blocks are shared, the last block and the banks copied.

        Raises (when run):
            SessionNotFound: no such source. SessionExists: the target is there.
        """
        find, absent = self.finder(key), self._absent(target)

        def operation() -> Any:
            source = find()
            if source is None or not absent():
                return WAIT
            if source.moving or self.restoring(source):
                return WAIT
            fork = self._store.get(target) or Session(target)
            self._copy_log(source, fork)
            fork.ttl = ttl if ttl is not None else source.ttl
            before = self._engine.allocator.num_free
            self._copy_state(source, fork)
            self._store.add(fork)
            self._store.touch(fork)
            added = (before - self._engine.allocator.num_free) * self._engine.block_bytes
            row = self._engine.pool.bytes_per_row if self._engine.pool is not None and fork.row is not None else 0
            made = {**self.describe(fork), "forked_from": key[1], "bytes_added": {"kv": added, "bank": row}}
            made = self.written(fork, made)
            self._store.trim()
            return made

        return operation

    def restoring(self, session: Session) -> bool:
        """Its state is below the device and on its way up."""
        tokens = self._mover.stored_tokens(session)
        if tokens is None:
            return False
        scheduler = self._engine.scheduler
        if scheduler.has_room(blocks_for(tokens) + 1):
            self._mover.restore(session)
            return True
        return False  # a fork of the log alone: it will be replayed

    def _copy_log(self, source: Session, fork: Session) -> None:
        fork.log, fork.context = list(source.log), array("i", source.context)
        fork.origin, fork.folds, fork.commits = source.origin, source.folds, source.commits
        fork.ending = source.ending
        fork.banks, fork.kept, fork.status = dict(source.banks), True, "new"
        fork.num_tokens = len(fork.context)
        fork.generation += 1

    def _copy_state(self, source: Session, fork: Session) -> None:
        """Of a resident source, as far as there is room; without it the fork is a log, to be replayed."""
        engine, pool = self._engine, self._engine.pool
        if not source.is_resident or not engine.scheduler.has_room(1) or (pool is not None and not pool.num_free):
            return
        if source.table is None or source.moving:  # nothing else could give way
            return
        full, rest = divmod(len(source.context), BLOCK)
        blocks = list(source.table.blocks[:full])
        try:
            last = engine.allocator.allocate(1, blocks[-1] if blocks else None) if rest else []
        except OutOfBlocks:
            return
        engine.allocator.share(blocks)
        table = KVTable([*blocks, *last])
        if rest:
            engine.copy_kv(source.table.blocks[full], last[0], rest)
        row = pool.take(source.row) if pool is not None and source.row is not None else None
        self._store.put(fork, table, row)
        source.wanted = False


def _rates(banks: dict[int, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Fill and lifetime reads per layer, with the share of reads that were hits, fuses and misses."""
    shown: dict[str, dict[str, Any]] = {}
    for layer, facts in banks.items():
        reads = sum(facts.get(name, 0) for name in ("hits", "fuses", "misses"))
        rates = {
            f"{name[:-1] if name != 'misses' else 'miss'}_rate": round(facts.get(name, 0) / reads, 4) if reads else None
            for name in ("hits", "fuses", "misses")
        }
        shown[str(layer)] = {**facts, **rates}
    return shown


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


def _pass_on(done: Future[Any], target: Future[Any], make: Callable[[Any], Any]) -> None:
    """Give ``target`` what ``make`` makes of a result, or the error."""
    try:
        settle(target, make(done.result()))
    except PaceError as error:
        settle(target, error=error)
    except Exception as error:
        settle(target, error=EngineError(f"the session directory failed: {reason(error)}"))


def _chain(source: Future[Any], target: Future[Any]) -> None:
    source.add_done_callback(lambda done: _pass_on(done, target, lambda result: result))
