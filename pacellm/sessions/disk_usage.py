"""What this server's sessions take of the session directory, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pacellm.sessions.disk import Sizes
from pacellm.sessions.session import Key


@dataclass
class FileSizes:
    """Bytes of one session on disk."""

    log: int = 0
    state: int = 0
    last_used: float = 0.0


class DiskUsage:
    """Bytes by session. Lives in the engine's thread."""

    def __init__(self) -> None:
        self._held: dict[Key, FileSizes] = {}
        self.log_bytes = self.state_bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes of all files, those whose removal is on its way not included."""
        return self.log_bytes + self.state_bytes

    def __iter__(self) -> Iterator[tuple[Key, FileSizes]]:
        return iter(list(self._held.items()))

    def __getitem__(self, key: Key) -> FileSizes:
        return self._held[key]

    def note(self, key: Key, sizes: Sizes, last_used: float) -> None:
        """A session's (log, state) bytes on disk, as found there."""
        self.forget(key)
        self._held[key] = FileSizes(*sizes, last_used)
        self.log_bytes, self.state_bytes = self.log_bytes + sizes[0], self.state_bytes + sizes[1]

    def forget(self, key: Key) -> None:
        """A session's files are gone, or another server's."""
        files = self._held.pop(key, None)
        if files is not None:
            self.log_bytes, self.state_bytes = self.log_bytes - files.log, self.state_bytes - files.state

    def of(self, tenant: str) -> set[Key]:
        """A tenant's sessions with files here."""
        return {key for key in self._held if key[0] == tenant}
