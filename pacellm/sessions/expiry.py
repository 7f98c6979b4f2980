"""When sessions expire, kept as they change: who asks whether any has looks through none that has not."""

from __future__ import annotations

import heapq
import itertools

from pacellm.sessions.session import Session

_SLACK = 1024  # entries that may be out of date


class ExpiryCalendar:
    """When sessions expire. One that is used lives longer without a word here: a due entry is looked at."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int]] = []  # (when, number)
        self._noted: dict[int, Session] = {}  # by number; other entries are out of date
        self._current: dict[int, tuple[float, int]] = {}  # by id: the entry that counts
        self._numbers = itertools.count()

    def note(self, session: Session) -> None:
        """A session has a time, maybe an earlier one."""
        expires = session.expires
        if expires is None:
            return
        known = self._current.get(id(session))
        if known is None or expires < known[0]:
            self._put(session, expires)

    def forget(self, session: Session) -> None:
        """A session is gone."""
        known = self._current.pop(id(session), None)
        if known is not None:
            del self._noted[known[1]]
        if len(self._entries) > 2 * len(self._noted) + _SLACK:
            self._entries = sorted(self._current.values())

    def expired(self, now: float, later: float) -> list[Session]:
        """Sessions whose time has come, but for those in use. They are looked at again at ``later``."""
        found = []
        while self._entries and self._entries[0][0] < now:
            session = self._noted.get(heapq.heappop(self._entries)[1])
            if session is None:
                continue
            expires = session.expires
            if expires is None:
                self.forget(session)
            elif expires >= now:
                self._put(session, expires)
            else:
                self._put(session, later)
                if not (session.busy or session.wanted):
                    found.append(session)
        return found

    def _put(self, session: Session, at: float) -> None:
        self.forget(session)
        entry = at, next(self._numbers)
        self._current[id(session)], self._noted[entry[1]] = entry, session
        heapq.heappush(self._entries, entry)
