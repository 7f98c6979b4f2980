"""Histories below the device: in host memory, and what does not fit there in the session directory, oldest first."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future

from pacellm.errors import reason
from pacellm.kv.history import HistoryBlock
from pacellm.sessions.files import SessionFiles
from pacellm.sessions.host_memory import HostMemory
from pacellm.sessions.stats import MoverStats
from pacellm.sessions.worker import Worker

logger = logging.getLogger("pacellm.sessions")
_SPARE = 8  # blocks begin to leave host memory when one part in so many of it is left
_RETRY_SECONDS = 10.0


class HistoryTier:
    """Has blocks of histories leave host memory for files before it is full. Lives in the engine's thread.

    Args:
        host: memory. worker: writes.
        files: in the session directory; None where there is none, and blocks stay.
        stats: where failures are counted.
    """

    def __init__(self, host: HostMemory, worker: Worker, files: SessionFiles | None, stats: MoverStats) -> None:
        self._host, self._worker, self._files, self._stats = host, worker, files, stats
        self._next_try, self._failure, self._num_open = 0.0, "", 0

    @property
    def capacity(self) -> int:
        """Bytes that histories may take, in host memory and on disk."""
        return self._host.capacity + (0 if self._files is None else self._files.budget.most_of_states)

    @property
    def failure(self) -> str | None:
        """Why the disk takes no blocks for now; None where it does, or there is none."""
        return None if time.monotonic() >= self._next_try else self._failure

    def has_room(self, wanted: int) -> bool:
        """``wanted`` bytes fit beside what is there, after others' states on disk gave way."""
        beyond, files = self._host.missing(wanted), self._usable_files
        return beyond <= 0 or (files is not None and files.budget.has_room(beyond))

    def write_out(self, missing: int) -> None:
        """Have blocks of ``missing`` bytes leave host memory, those on their way included, as far as the disk takes
        them."""
        files, memory = self._usable_files, self._host.history
        missing -= memory.leaving
        if files is None or missing <= 0 or not files.budget.has_room(missing + memory.leaving):
            return
        blocks = memory.oldest(missing)
        if blocks:
            self._num_open += 1
            self._worker.submit(lambda: self._write(blocks, files), self._written)

    @property
    def is_draining(self) -> bool:
        """Blocks are on their way to disk."""
        return self._num_open > 0

    def make_room(self, wanted: int) -> bool:
        """Have others leave for blocks of ``wanted`` bytes. False until they have left; True also where no more can,
        and host memory holds more than it should."""
        self.write_out(self._host.missing(wanted + self._host.capacity // _SPARE))
        return self._host.missing(wanted) <= 0 or not self.is_draining

    def _write(self, blocks: list[HistoryBlock], files: SessionFiles) -> None:
        """In the worker."""
        try:
            for block in blocks:
                files.disk.histories.write_out(block)
        finally:
            files.disk.histories.measure()
            for block in blocks:
                if block.file is None:
                    self._host.history.stays(block)

    def _written(self, done: Future[None]) -> None:
        self._num_open -= 1
        if (error := done.exception()) is not None:
            self._next_try, self._failure = time.monotonic() + _RETRY_SECONDS, reason(error)
            self._stats.failures += 1
            logger.warning("histories stay in host memory: they cannot be written: %s", self._failure)

    @property
    def _usable_files(self) -> SessionFiles | None:
        return self._files if self.failure is None else None
