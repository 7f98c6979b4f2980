"""The tier below the device: sessions' KV and banks in host memory, within a budget of bytes."""

from __future__ import annotations

from collections import Counter

from pacellm.kv.history import HistoryMemory
from pacellm.sessions.host_state import HostState
from pacellm.sessions.session import Session
from pacellm.sessions.worker import Worker


class HostMemory:
    """Which sessions have a copy in host memory. Lives in the engine's thread.

    Args:
        capacity: bytes of KV and banks.
        worker: gives memory back: a gigabyte takes the system a tenth of a second.

    Attributes:
        history: counts what has left the windows of sessions, running requests and cached prefixes.
    """

    def __init__(self, capacity: int, worker: Worker) -> None:
        self.capacity, self._worker = capacity, worker
        self.history = HistoryMemory()
        self._sessions: dict[int, Session] = {}  # by id; some may have lost their copy
        self._reserved = 0

    @property
    def bytes(self) -> int:
        """Bytes of KV and banks in host memory, those on their way and histories beyond their budget included; what
        has a file is not."""
        held = sum(s.host.nbytes for s in list(self._sessions.values()) if s.host is not None)
        return self._reserved + self.history.bytes + held

    def missing(self, wanted: int) -> int:
        """How far ``wanted`` bytes beside what is there now are too many; negative where there is room."""
        return self.bytes + wanted - self.capacity

    def has_room(self, wanted: int) -> bool:
        """``wanted`` bytes fit beside what is there, once what is on its way to disk has left."""
        return self.missing(wanted) <= self.history.leaving

    def idle(self) -> list[Session]:
        """Sessions whose copy may go, in the order in which they give way: of the tenant that holds most, the one used
        longest ago."""
        self._sessions = {number: session for number, session in self._sessions.items() if session.host is not None}
        held: Counter[str] = Counter()
        for session in self._sessions.values():
            held[session.key[0]] += session.host.nbytes if session.host is not None else 0
        found = [session for session in self._sessions.values() if not session.in_use]
        return sorted(found, key=lambda session: (-held[session.key[0]], session.last_used))

    def reserve(self, nbytes: int) -> None:
        """A copy of so many bytes is being made."""
        self._reserved += nbytes

    def arrived(self, nbytes: int) -> None:
        """It was made, or not."""
        self._reserved -= nbytes

    def put(self, session: Session, state: HostState) -> None:
        """A session has this copy."""
        session.host = state
        self._sessions[id(session)] = session

    def forget(self, session: Session) -> None:
        """A session is gone; the copy of one that moves goes when it has moved."""
        if not session.moving:
            self.free(session)
        self._sessions.pop(id(session), None)

    def free(self, session: Session) -> None:
        """Let a session's copy go."""
        state, session.host = session.host, None
        if state is not None:
            self._worker.submit(state.clear, lambda done: None)
