"""What sessions hold, by tier, kept as they change: a scrape adds nothing up. And when the next ones expire."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import TYPE_CHECKING

from pacellm.memory.state import banks_nbytes

if TYPE_CHECKING:
    from pacellm.sessions.session import Session, Tier

_SLACK = 1024  # entries of a calendar that may be out of date


class Calendar:
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


class Books:
    """Sums over a store's sessions. Written by the engine thread, read by whoever scrapes.

    Attributes:
        tiers: sessions by the highest tier that has their state.
        host_bytes, host_bank_bytes: of sessions in host memory; the latter are part of the former.
        stored, stored_tokens: sessions whose KV and banks are on disk, and their tokens.
        calendar: of their ends.
    """

    def __init__(self) -> None:
        self.tiers: Counter[Tier] = Counter()
        self.host_bytes = self.host_bank_bytes = self.stored = self.stored_tokens = 0
        self.calendar = Calendar()
        self._entries: dict[int, tuple[Tier, int, int, int | None]] = {}  # by id: as it was added

    def enter(self, session: Session) -> None:
        """Add a session, or what has changed of it."""
        self.leave(session)
        host, stored = session.host, session.stored
        nbytes, banks = (0, 0) if host is None else (host.nbytes, banks_nbytes(host.banks))
        self._entries[id(session)] = session.tier, nbytes, banks, stored
        self._add(1, session.tier, nbytes, banks, stored)

    def leave(self, session: Session) -> None:
        """Take a session out, if it is in."""
        entry = self._entries.pop(id(session), None)
        if entry is not None:
            self._add(-1, *entry)

    def _add(self, sign: int, tier: Tier, nbytes: int, banks: int, stored: int | None) -> None:
        self.tiers[tier] += sign
        self.host_bytes += sign * nbytes
        self.host_bank_bytes += sign * banks
        self.stored += sign * (stored is not None)
        self.stored_tokens += sign * (stored or 0)
