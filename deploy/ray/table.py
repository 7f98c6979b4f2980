"""Which replica holds which session: from what replicas report, and from what was just sent where. Knows no Ray.

A report is bytes, 12 for a session: a digest of tenant and id (8), and the session's generation (4), little-endian.
Names of sessions and tenants never leave the replica.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Hashable, Iterable, Iterator

_ENTRY = struct.Struct("<QI")
_GRACE = 60.0  # seconds in which a report need not mention yet what was sent to its replica
MAX_REPORTED = 20_000  # sessions of one replica: 240 kB


def digest(tenant: str, session: str) -> int:
    """64 bits that stand for a tenant's session."""
    return int.from_bytes(hashlib.blake2b(f"{tenant}\0{session}".encode(), digest_size=8).digest(), "little")


def write_report(held: Iterable[tuple[int, int]]) -> bytes:
    """A report of (digest, generation)."""
    return b"".join(_ENTRY.pack(key, generation & 0xFFFFFFFF) for key, generation in held)


def read_report(report: bytes) -> Iterator[tuple[int, int]]:
    """(digest, generation) of every session; a report that was cut is an error.

    Raises:
        ValueError: it is not a whole number of entries.
    """
    if len(report) % _ENTRY.size:
        raise ValueError(f"a report of {len(report)} bytes is not a whole number of entries of {_ENTRY.size}")
    return _ENTRY.iter_unpack(report)


class SessionTable:
    """Sessions to replicas.

    What was sent somewhere (:meth:`sent`) counts until that replica's report mentions it, or has not mentioned it for a
    minute. Of two replicas that report a session, the one with the later generation holds it: the other had it before.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[Hashable, tuple[bytes, dict[int, int]]] = {}
        self._holders: dict[int, Hashable] = {}
        self._sent: dict[int, tuple[Hashable, float]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def holder(self, key: int) -> Hashable | None:
        """The replica that holds a session, None where nobody is known to."""
        sent = self._sent.get(key)
        return sent[0] if sent is not None else self._holders.get(key)

    def sent(self, key: int, replica: Hashable) -> None:
        """A request of this session went to this replica."""
        if self.holder(key) != replica or key in self._sent:
            self._sent[key] = (replica, self._clock())

    def update(self, reports: dict[Hashable, bytes]) -> None:
        """The replicas that run now, each with its last report; those that are not among them hold nothing."""
        orphans: set[int] = set()
        for replica in self._reports.keys() - reports.keys():
            _, held = self._reports.pop(replica)
            orphans |= self._drop(replica, held)
        self._sent = {key: sent for key, sent in self._sent.items() if sent[0] in reports}
        for replica, report in reports.items():
            old = self._reports.get(replica)
            if old is None or old[0] != report:
                orphans |= self._take(replica, report)
        if orphans:
            self._choose(orphans)
        self._settle()

    def _take(self, replica: Hashable, report: bytes) -> set[int]:
        """A replica's new report; the sessions that it may not hold any more."""
        held = dict(read_report(report))
        _, before = self._reports.get(replica, (b"", {}))
        self._reports[replica] = (report, held)
        orphans = self._drop(replica, [key for key in before if held.get(key, -1) < before[key]])
        for key, generation in held.items():
            holder = self._holders.get(key)
            if holder is None or generation > self._reports[holder][1][key]:
                self._holders[key] = replica
        return orphans

    def _drop(self, replica: Hashable, keys: Iterable[int]) -> set[int]:
        """Of these, the sessions that the replica held: now nobody does."""
        dropped = {key for key in keys if self._holders.get(key) == replica}
        for key in dropped:
            del self._holders[key]
        return dropped

    def _choose(self, keys: set[int]) -> None:
        """Give each of these sessions to the replica that reports the latest generation, in one pass."""
        for replica, (_, held) in self._reports.items():
            for key in held.keys() & keys:
                holder = self._holders.get(key)
                if holder is None or held[key] > self._reports[holder][1][key]:
                    self._holders[key] = replica

    def _settle(self) -> None:
        """What a report mentions need not be remembered apart, nor what it does not mention for long."""
        late = self._clock() - _GRACE
        for key, (replica, when) in list(self._sent.items()):
            if self._holders.get(key) == replica or when < late:
                del self._sent[key]
