"""What this server's sessions take of the session directory, in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from pacellm.sessions.disk import Disk
from pacellm.sessions.folder import Sizes
from pacellm.sessions.session import Key


@dataclass
class FileSizes:
    """Bytes of one session on disk."""

    sizes: Sizes
    last_used: float = 0.0


class DiskUsage:
    """Bytes by session. Lives in the engine's thread.

    Args:
        disk: has blocks of histories that belong to no session's state yet; None where there is no directory.
    """

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk
        self._held: dict[Key, FileSizes] = {}
        self._log = self._state = self._history = 0
        self._holders: Counter[str] = Counter()  # of blocks, by name

    @property
    def log_bytes(self) -> int:
        """Bytes of logs."""
        return self._log

    @property
    def state_bytes(self) -> int:
        """Bytes of states, with their histories."""
        return self._state + self._history

    @property
    def unlisted_bytes(self) -> int:
        """Bytes of histories' blocks that no state lists."""
        return 0 if self._disk is None else self._disk.histories.unlisted_bytes

    @property
    def history_bytes(self) -> int:
        """Bytes of all histories' blocks, those that forks share counted once."""
        return self._history + self.unlisted_bytes

    @property
    def session_bytes(self) -> int:
        """Bytes of sessions' files, those whose removal is on its way not included."""
        return self.log_bytes + self.state_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return self.session_bytes + self.unlisted_bytes

    def __iter__(self) -> Iterator[tuple[Key, FileSizes]]:
        return iter(list(self._held.items()))

    def __getitem__(self, key: Key) -> FileSizes:
        return self._held[key]

    def note(self, key: Key, sizes: Sizes, last_used: float) -> None:
        """A session's files, as found there."""
        self.forget(key)
        self._held[key] = FileSizes(sizes, last_used)
        self._add(1, sizes)
        for name, size in sizes.blocks.items():
            self._history += 0 if self._holders[name] else size
            self._holders[name] += 1

    def forget(self, key: Key) -> None:
        """A session's files are gone, or another server's."""
        files = self._held.pop(key, None)
        if files is None:
            return
        self._add(-1, files.sizes)
        for name, size in files.sizes.blocks.items():
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                self._history -= size

    def _add(self, sign: int, sizes: Sizes) -> None:
        self._log += sign * sizes.log
        self._state += sign * (sizes.state - sum(sizes.blocks.values()))

    def of_session(self, key: Key) -> int:
        """Bytes of a session's files."""
        files = self._held.get(key)
        return 0 if files is None else files.sizes.all

    def of(self, tenant: str) -> set[Key]:
        """A tenant's sessions with files here."""
        return {key for key in self._held if key[0] == tenant}
