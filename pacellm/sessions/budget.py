"""Keeps the session directory within its bytes: stored states give way first, then the sessions themselves."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from pacellm.sessions.claims import Openings
from pacellm.sessions.disk import LOG, STATE, Disk, Sizes
from pacellm.sessions.session import Key, Session
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker

logger = logging.getLogger("pacellm.sessions")
_SPARE = 32  # making room frees one part in so many beyond what is wanted, so that not every write looks for victims


@dataclass
class _Files:
    """Bytes of one session on disk."""

    log: int = 0
    state: int = 0
    last_used: float = 0.0

    @property
    def bytes(self) -> int:
        return self.log + self.state


class DiskBudget:
    """What this server's sessions take on disk, and which of them give way. Lives in the engine's thread.

    A stored state is a cache of its session's log: states go before any log does, those of an older generation first.
    A session whose log goes is ``lost``, unless memory still holds its log. Of the tenant that holds most, the least
    recently used goes first; sessions in use, and those of other running servers, never do.

    Args:
        limit: bytes of all files; None is no limit.
        store, openings: know which sessions are in use.
        bury: leaves a tombstone in place of a session that is lost.
    """

    def __init__(
        self,
        limit: int | None,
        store: SessionStore,
        openings: Openings,
        worker: Worker,
        disk: Disk,
        bury: Callable[[Key], object],
    ) -> None:
        self.limit, self.store, self._openings, self._worker, self._disk = limit, store, openings, worker, disk
        self._bury = bury
        self._held: dict[Key, _Files] = {}
        self.log_bytes = self.state_bytes = 0
        self.states_dropped = self.logs_dropped = 0

    @property
    def bytes(self) -> int:
        """Bytes of all files, those whose removal is on its way not included."""
        return self.log_bytes + self.state_bytes

    def note(self, key: Key, sizes: Sizes, last_used: float) -> None:
        """A session's (log, state) bytes on disk, as found there."""
        self.forget(key)
        self._held[key] = _Files(*sizes, last_used)
        self.log_bytes, self.state_bytes = self.log_bytes + sizes[0], self.state_bytes + sizes[1]

    def forget(self, key: Key) -> None:
        """A session's files are gone, or another server's."""
        files = self._held.pop(key, None)
        if files is not None:
            self.log_bytes, self.state_bytes = self.log_bytes - files.log, self.state_bytes - files.state

    def of(self, tenant: str) -> set[Key]:
        """A tenant's sessions with files here."""
        return {key for key in self._held if key[0] == tenant}

    def has_room(self, wanted: int) -> bool:
        """A state of ``wanted`` bytes fits, after others gave way; logs never do for a state."""
        if self.limit is None:
            return True
        if self.log_bytes + wanted > self.limit:
            return False
        if self.bytes + wanted > self.limit:
            self._drop_states(self.limit - wanted)
        return self.bytes + wanted <= self.limit

    def trim(self, but: Key | None = None) -> None:
        """After a write, that of ``but``: back within the limit."""
        if self.limit is None or self.bytes <= self.limit:
            return
        self._drop_states(self.limit)
        if self.bytes > self.limit:
            self._drop_logs(self.limit, but)

    def _drop_states(self, most: int) -> None:
        for key, session in self._victims("state"):
            if self.bytes <= most - most // _SPARE:
                return
            if session is not None:
                session.stored = None
            self.states_dropped += 1
            self._remove(key, STATE)

    def _drop_logs(self, most: int, but: Key | None) -> None:
        for key, session in self._victims("log"):
            if key == but:
                continue
            if self.bytes <= most - most // _SPARE:
                return
            self.logs_dropped += 1
            if session is not None and not session.stub:
                session.saved = session.stored = None
                self._remove(key, LOG, STATE)
                continue
            logger.warning("session %r of tenant %r is lost: the session directory is full", key[1], key[0])
            if session is not None:
                self.store.remove(session, lost=True)
            self.forget(key)
            self._bury(key)

    def _remove(self, key: Key, *names: str) -> None:
        files = self._held[key]
        self.note(key, (0 if LOG in names else files.log, 0), files.last_used)
        self._worker.submit(lambda: self._disk.drop(key, *names), lambda done: self._removed(key, done))

    def _removed(self, key: Key, done: Future[None]) -> None:
        if (error := done.exception()) is not None:
            logger.warning("session %r of tenant %r: files could not be removed: %s", key[1], key[0], str(error))

    def _victims(self, kind: Literal["log", "state"]) -> Iterator[tuple[Key, Session | None]]:
        """Idle sessions with such a file, in the order in which they give way."""
        idle: dict[str, list[tuple[bool, float, Key]]] = defaultdict(list)
        held: Counter[str] = Counter()
        for key, files in self._held.items():
            size, session = getattr(files, kind), self.store.get(key)
            held[key[0]] += size
            if size and not self._openings.is_asking(key) and not (session is not None and session.in_use):
                is_current = kind == "log" or session is None or session.stored is not None
                used = max(files.last_used, session.last_used if session is not None else 0.0)
                idle[key[0]].append((is_current, used, key))
        for keys in idle.values():
            keys.sort(reverse=True)  # who gives way first is last
        while idle:
            tenant = max(idle, key=lambda tenant: held[tenant])
            key = idle[tenant].pop()[2]
            held[tenant] -= getattr(self._held[key], kind)
            if not idle[tenant]:
                del idle[tenant]
            yield key, self.store.get(key)
