"""Deleting sessions' files: tombstones now, or at a later try where the disk refuses."""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import suppress

from pacellm.sessions.claims import DirectoryClaims
from pacellm.sessions.disk import Disk
from pacellm.sessions.disk_usage import DiskUsage
from pacellm.sessions.session import Key
from pacellm.sessions.stats import MoverStats
from pacellm.sessions.worker import Worker

_RETRY_SECONDS = 10.0


class Deletions:
    """Leaves tombstones: jobs for the worker, and their bookkeeping in the engine's thread.

    Args:
        disk: the session directory.
        claims, usage: forget what goes.
        stats: where failures are counted.
    """

    def __init__(
        self, disk: Disk, worker: Worker, claims: DirectoryClaims, usage: DiskUsage, stats: MoverStats
    ) -> None:
        self._disk, self._worker, self._claims, self._usage, self._stats = disk, worker, claims, usage, stats
        self._next_try = 0.0

    def delete(self, key: Key, *, expired: bool = False) -> Future[bool]:
        """Leave a tombstone, now or at a later try; whether there was a session."""
        self._forget(key)
        return self._worker.submit(
            lambda: self._disk.delete(key, expired=expired), lambda done: self._deleted(key, done), needs_room=True
        )

    def _deleted(self, key: Key, done: Future[bool]) -> None:
        if (error := done.exception()) is not None:
            self._stats.say_failure(key, "deleting its files, which is tried again,", error)

    def delete_all(self, tenant: str, keys: set[Key]) -> Future[tuple[int, int]]:
        """Leave a tombstone for all of a tenant's sessions, ``keys`` among them: (how many, how many of them at a later
        try)."""
        for key in self._claims.of(tenant) | self._usage.of(tenant):
            self._forget(key)

        def job() -> tuple[int, int]:
            gone = keys | {(owner.tenant, owner.id) for owner in self._disk.owners() if owner.tenant == tenant}
            for key in gone:
                with suppress(OSError):
                    self._disk.delete(key)
            return len(gone), len(gone & self._disk.doomed.keys())

        return self._worker.submit(job, lambda done: None)

    def retry(self) -> None:
        """Have deletions tried again that the disk has refused, every few seconds."""
        if self._disk.doomed and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + _RETRY_SECONDS
            self._worker.submit(self._disk.retry, lambda done: None)

    def _forget(self, key: Key) -> None:
        self._claims.forget(key)
        self._usage.forget(key)
