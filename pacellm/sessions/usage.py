"""What sessions hold, by tier, kept as they change: a scrape adds nothing up."""

from __future__ import annotations

from collections import Counter

from pacellm.memory.state import banks_nbytes
from pacellm.sessions.session import Session, Tier


class TierUsage:
    """Sums over a store's sessions. Written by the engine thread, read by whoever scrapes.

    Attributes:
        tiers: sessions by the highest tier that has their state.
        host_bytes, host_bank_bytes: of sessions in host memory; the latter are part of the former.
        stored, stored_tokens: sessions whose KV and banks are on disk, and their tokens.
    """

    def __init__(self) -> None:
        self.tiers: Counter[Tier] = Counter()
        self.host_bytes = self.host_bank_bytes = self.stored = self.stored_tokens = 0
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
