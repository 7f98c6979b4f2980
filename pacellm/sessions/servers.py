"""The servers that share a session directory: each locks a mark while it runs, so that the others know it lives."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from pacellm.sessions.folder import open_lock


class Servers:
    """The running servers of a directory, of which this is one from here on.

    Args:
        directory: of the sessions; created where it is missing.

    Attributes:
        own: this server's id.
        blocks: where blocks of histories lie that no state lists.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._marks, self._histories = directory / "servers", directory / "history"
        self.own = uuid.uuid4().hex
        self.blocks = self._histories / self.own
        self._marks.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mark = os.open(self._marks / self.own, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._mark, fcntl.LOCK_EX)

    @property
    def is_closed(self) -> bool:
        """This server is no longer among them."""
        return self._mark < 0

    def close(self) -> None:
        """This server's sessions may be taken over by others."""
        with suppress(OSError):  # a mark that nobody locks is a dead server's
            (self._marks / self.own).unlink()
        os.close(self._mark)
        self._mark = -1

    def is_running(self, server: str) -> bool:
        """It locks its mark."""
        try:
            handle = open_lock(self._marks / server)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(handle)

    def tidy(self) -> None:
        """Remove marks and blocks of dead servers."""
        for mark in self._marks.iterdir():
            if mark.name != self.own and not self.is_running(mark.name):
                mark.unlink(missing_ok=True)
        for blocks in self._histories.glob("*"):
            if blocks.name != self.own and not self.is_running(blocks.name):
                shutil.rmtree(blocks, ignore_errors=True)
