"""Keeps the session directory within its bytes: stored states give way first, then the sessions themselves."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal

from pacellm.sessions.claims import DirectoryClaims
from pacellm.sessions.deletions import Deletions
from pacellm.sessions.disk import LOG, STATE, Disk
from pacellm.sessions.disk_usage import DiskUsage, FileSizes
from pacellm.sessions.folder import Sizes
from pacellm.sessions.session import Key, Session
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker

logger = logging.getLogger("pacellm.sessions")
_SPARE = 32  # making room frees one part in so many beyond what is wanted, so that not every write looks for victims


class DiskBudget:
    """What this server's sessions take on disk, and which of them give way. Lives in the engine's thread.

    A stored state is a cache of its session's log: states go before any log does, those of an older generation first,
    and last those whose blocks memory has maps of.
    A session whose log goes is ``lost``, unless memory still holds its log. Of the tenant that holds most, the least
    recently used goes first; sessions in use, and those of other running servers, never do.

    Args:
        limit: bytes of all files; None is no limit.
        usage: what lies there.
        store, claims: know which sessions are in use.
        disk: the directory. worker: removes files.
        deletions: leave a tombstone in place of a session that is lost.
    """

    def __init__(
        self,
        limit: int | None,
        usage: DiskUsage,
        store: SessionStore,
        claims: DirectoryClaims,
        worker: Worker,
        disk: Disk,
        deletions: Deletions,
    ) -> None:
        self.limit, self._usage, self._store, self._claims = limit, usage, store, claims
        self._worker, self._disk, self._deletions = worker, disk, deletions
        self._without_files: list[Session] = []
        self._num_removing = 0
        self.states_dropped = self.logs_dropped = 0

    @property
    def most_of_states(self) -> int:
        """Bytes that all states and histories may take beside the logs; without a limit what was free."""
        return self._disk.histories.free_bytes if self.limit is None else max(0, self.limit - self._usage.log_bytes)

    def has_room(self, wanted: int) -> bool:
        """A state of ``wanted`` bytes fits, after others gave way; logs never do for a state."""
        if self.limit is None:
            return wanted <= self.most_of_states
        if self._usage.log_bytes + wanted > self.limit:
            return False
        if self._usage.bytes + wanted > self.limit:
            self._drop_states(self.limit - wanted)
        return self._usage.bytes + wanted <= self.limit

    def trim(self, but: Key | None = None) -> None:
        """After a write, that of ``but``: back within the limit."""
        if self.limit is None or self._usage.bytes <= self.limit:
            return
        self._drop_states(self.limit)
        if self._usage.session_bytes > self.limit:
            self._drop_logs(self.limit, but)

    def make_room(self) -> bool:
        """The disk is full for what must be written: states give way, then blocks that no state lists. False where
        nothing is left to."""
        if not self._num_removing:
            self._drop_states(self._usage.bytes - 1)
            self.settle()
        return self._num_removing > 0 or any(self._let_go(session) for session in self._store)

    def settle(self) -> None:
        """Between steps: idle sessions let go of the files that memory has maps of where these gave way, because only
        then the disk has the room, and of others while there are too many."""
        going, self._without_files = self._without_files, []
        for session in going:
            self._let_go(session)
        if self.limit is not None and self._usage.unlisted_bytes:
            for session in self._store:
                if self._usage.bytes <= self.limit:
                    return
                self._let_go(session)

    def _let_go(self, session: Session) -> bool:
        is_free = session.maps_files and session.stored is None and not session.in_use
        if is_free:
            self._store.drop(session)
            self._submit(session.key, self._disk.histories.remove_gone)
        return is_free

    def _drop_states(self, most: int) -> None:
        for key, session in self._victims("state"):
            if self._usage.bytes <= most - most // _SPARE:
                return
            if session is not None:
                session.stored = None
                if session.maps_files:
                    self._without_files.append(session)
            self.states_dropped += 1
            self._remove(key, STATE)

    def _drop_logs(self, most: int, but: Key | None) -> None:
        for key, session in self._victims("log"):
            if key == but:
                continue
            if self._usage.session_bytes <= most - most // _SPARE:
                return
            self.logs_dropped += 1
            if session is not None and not session.stub:
                session.saved = session.stored = None
                self._remove(key, LOG, STATE)
                continue
            logger.warning("session %r of tenant %r is lost: the session directory is full", key[1], key[0])
            if session is not None:
                self._store.remove(session, lost=True)
            self._deletions.delete(key, expired=True)

    def _remove(self, key: Key, *names: str) -> None:
        files = self._usage[key]
        self._usage.note(key, Sizes(0 if LOG in names else files.sizes.log), files.last_used)
        self._submit(key, lambda: self._disk.drop(key, *names))

    def _submit(self, key: Key, remove: Callable[[], None]) -> None:
        self._num_removing += 1
        self._worker.submit(remove, lambda done: self._removed(key, done))

    def _removed(self, key: Key, done: Future[None]) -> None:
        self._num_removing -= 1
        if (error := done.exception()) is not None:
            logger.warning("session %r of tenant %r: files could not be removed: %s", key[1], key[0], str(error))

    def _victims(self, kind: Literal["log", "state"]) -> Iterator[tuple[Key, Session | None]]:
        """Idle sessions with such a file, in the order in which they give way."""
        idle: dict[str, list[tuple[bool, bool, float, Key]]] = defaultdict(list)
        held: Counter[str] = Counter()
        for key, files in self._usage:
            size, session = getattr(files.sizes, kind), self._store.get(key)
            held[key[0]] += size
            if size and not self._is_needed(key, session):
                idle[key[0]].append((*_rank(kind, files, session), key))
        for keys in idle.values():
            keys.sort(reverse=True)  # who gives way first is last
        while idle:
            tenant = max(idle, key=lambda tenant: held[tenant])
            key = idle[tenant].pop()[3]
            held[tenant] -= getattr(self._usage[key].sizes, kind)
            if not idle[tenant]:
                del idle[tenant]
            yield key, self._store.get(key)

    def _is_needed(self, key: Key, session: Session | None) -> bool:
        return self._claims.is_asking(key) or (session is not None and session.in_use)


def _rank(kind: str, files: FileSizes, session: Session | None) -> tuple[bool, bool, float]:
    """Who gives way first has the least: (memory has maps of its files, its state is the present one, last use)."""
    if session is None:
        return False, True, files.last_used
    used = max(files.last_used, session.last_used)
    return (False, True, used) if kind == "log" else (session.maps_files, session.stored is not None, used)
