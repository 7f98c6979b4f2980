"""Sessions' files in the session directory: written at rest and at commits, deleted, kept within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from pacellm.engine.sequence import Sequence
from pacellm.errors import SessionConflict
from pacellm.memory.pool import BankPool
from pacellm.memory.state import Banks, copy_banks
from pacellm.sessions.budget import DiskBudget
from pacellm.sessions.claims import Openings
from pacellm.sessions.disk import Disk, Sizes
from pacellm.sessions.owner import Owner, Seen
from pacellm.sessions.records import Records, ending_metadata
from pacellm.sessions.session import Key, Session
from pacellm.sessions.stats import MoverStats
from pacellm.sessions.store import SessionStore
from pacellm.sessions.turn import Turn
from pacellm.sessions.worker import Worker

Then = Callable[[Future], None]
_RETRY_SECONDS = 10.0


@dataclass
class Resting:
    """A session at rest, as a save takes it."""

    owner: Owner
    seen: Seen | None
    log: list[Turn] | None
    origin: Banks | None
    meta: dict[str, str]
    seconds: float = 0.0


class SessionFiles:
    """Writes sessions into a directory: jobs for the worker, and their bookkeeping in the engine's thread.

    Args:
        store, openings: the engine's.
        disk: the directory. records: how sessions are written there.
        limit: bytes of all files; None is no limit.
        stats: where moves are counted.
    """

    def __init__(
        self,
        store: SessionStore,
        openings: Openings,
        worker: Worker,
        disk: Disk,
        records: Records,
        limit: int | None,
        stats: MoverStats,
    ) -> None:
        self.store, self.openings, self.worker = store, openings, worker
        self.disk, self.records, self.stats = disk, records, stats
        self.budget = DiskBudget(limit, store, openings, worker, disk, lambda key: self.bury(key, expired=True))
        openings.on_sizes = self.budget.note
        self._next_try = 0.0

    def find(self) -> None:
        """At start-up: what lies in the directory, as sessions whose logs are on disk only."""
        for owner in sorted(self.disk.owners(), key=lambda owner: owner.changed):
            session = self.openings.from_owner(owner)
            self.store.add(session)
            if not self.disk.is_elsewhere(owner):
                self.budget.note(session.key, self.disk.sizes(session.key), session.last_used)
        self.budget.trim()

    # -- at rest -------------------------------------------------------------------------------------------

    def rest(self, session: Session) -> Resting:
        """What a save needs of a session, as it is now."""
        return Resting(
            owner=self._owner(session),
            seen=session.seen,
            log=list(session.log) if session.saved != session.generation else None,
            origin=session.origin,
            meta=self.records.metadata(session),
        )

    def save(
        self,
        session: Session,
        tensors: Callable[[], dict[str, Tensor]] | None = None,
        free: Callable[[], None] = lambda: None,
    ) -> None:
        """Have a session at rest written, and its blocks and row given back then.

        Args:
            tensors: of its state, asked for in the worker; None writes the log alone, where it is not there yet.
            free: called in the worker at the end, whatever happened.
        """
        resting = self.rest(session)
        session.moving = True

        def job() -> tuple[int, Sizes]:
            try:
                nbytes = self._write(resting, tensors() if tensors is not None else None)
            finally:
                free()
            return nbytes, self.disk.sizes(session.key)

        self.worker.submit(job, lambda done: self._saved(session, resting, done))

    def _write(self, resting: Resting, state: dict[str, Tensor] | None) -> int:
        """In the worker; returns bytes of state."""
        started = time.monotonic()
        log = self.records.log_tensors(resting.log, resting.origin) if resting.log is not None else None
        owner = resting.owner
        owner.about.saved = owner.generation
        if state is not None:
            owner.about.stored = owner.about.tokens
        self.disk.save(owner, resting.seen, log, state, resting.meta)
        resting.seconds = time.monotonic() - started
        return sum(tensor.nbytes for tensor in (state or {}).values())

    def _saved(self, session: Session, resting: Resting, done: Future[tuple[int, Sizes]]) -> None:
        session.moving = False
        self.store.release(session)
        if (error := done.exception()) is not None:
            self.stats.say_failure(session.key, "writing to the session directory", error)
            return
        nbytes, sizes = done.result()
        session.seen = resting.owner.seen
        if not session.deleted and session.generation == resting.owner.generation:
            session.saved, session.foreign = session.generation, False
            if nbytes:
                session.stored = len(session.context) if not session.stub else session.num_tokens
                self.stats.count_spill(nbytes, resting.seconds)
        self._noted(session, sizes)

    def _noted(self, session: Session, sizes: Sizes) -> None:
        if session.deleted:
            return  # a tombstone takes the files' place, or somebody else has them
        self.budget.note(session.key, sizes, session.last_used)
        self.budget.trim(but=session.key)

    # -- commits -------------------------------------------------------------------------------------------

    def record(self, sequence: Sequence, session: Session, pool: BankPool | None, then: Then) -> None:
        """Take note of a commit, with its log where commits are synced; ``then`` gets the future. Where they are not, a
        folder that cannot be written costs nothing but that: the session goes on in memory.

        Args:
            sequence: is committed to the session.
            pool: has the working copy's banks, which become the origin if the log is folded now.
        """
        disk, records = self.disk, self.records
        turn, row = sequence.fed(), sequence.row
        seen, owner = session.seen, self._owner(session)
        owner.generation += 1
        about = owner.about
        about.stored, about.saved = None, owner.generation if disk.sync else session.saved
        about.tokens, about.commits = turn.end, session.commits + 1
        meta = records.metadata(session, owner.generation)
        meta.pop("ending", None)
        meta |= {
            "tokens": str(turn.end),
            "commits": str(session.commits + 1),
            **ending_metadata(sequence.ending),
        }
        log, origin = [*session.log, turn], session.origin
        if self.store.will_fold(session, turn):
            log, meta["folds"], about.tokens = [], str(session.folds + 1), 0
            origin = copy_banks(pool.banks(row)) if pool is not None and row is not None else None

        def job() -> Sizes | OSError:
            try:
                disk.record(owner, seen, records.log_tensors(log, origin) if disk.sync else None, meta)
                return disk.sizes(session.key)
            except OSError as error:
                if disk.sync:
                    raise
                return error

        def noted(done: Future[Sizes | OSError]) -> None:
            found = None if done.exception() is not None else done.result()
            if isinstance(found, OSError):
                self.stats.say_failure(session.key, "noting a commit", found)
            elif found is not None:
                session.seen = owner.seen
            then(done)
            if isinstance(found, tuple):
                self._noted(session, found)

        self.worker.submit(job, noted)

    def replace_log(self, session: Session) -> Future[Sizes]:
        """Take note of a session that was emptied or replaced, with its log."""
        disk, records, seen, owner = self.disk, self.records, session.seen, self._owner(session)
        log, origin, meta = list(session.log), session.origin, records.metadata(session)
        owner.about.stored, owner.about.saved = None, owner.generation
        session.moving = True

        def job() -> Sizes:
            disk.record(owner, seen, records.log_tensors(log, origin), meta)
            return disk.sizes(session.key)

        def then(done: Future[Sizes]) -> None:
            session.moving = False
            error = done.exception()
            if error is None:
                session.seen = owner.seen
                self._noted(session, done.result())
            elif not isinstance(error, SessionConflict):
                self.stats.say_failure(session.key, "writing a changed session", error)
            if session.deleted:
                self.store.drop(session)
            elif error is None:
                session.saved, session.foreign = session.generation, False
            elif isinstance(error, SessionConflict):
                self.store.remove(session)
                self.budget.forget(session.key)

        return self.worker.submit(job, then)

    def recorded(self, session: Session) -> None:
        """After the commit: what of it is on disk."""
        if self.disk.sync:
            session.saved, session.foreign = session.generation, False

    # -- deleting ------------------------------------------------------------------------------------------

    def bury(self, key: Key, *, expired: bool = False) -> Future[bool]:
        """Leave a tombstone, now or at a later try."""
        self.forget(key)
        return self.worker.submit(lambda: self.disk.delete(key, expired=expired), lambda done: self._buried(key, done))

    def _buried(self, key: Key, done: Future[bool]) -> None:
        if (error := done.exception()) is not None:
            self.stats.say_failure(key, "deleting its files, which is tried again,", error)

    def bury_all(self, tenant: str, keys: set[Key]) -> Future[tuple[int, int]]:
        """Leave a tombstone for all of a tenant's sessions, ``keys`` among them: (how many, how many of them at a later
        try)."""
        for key in self.openings.of(tenant) | self.budget.of(tenant):
            self.forget(key)

        def job() -> tuple[int, int]:
            gone = keys | {(owner.tenant, owner.id) for owner in self.disk.owners() if owner.tenant == tenant}
            for key in gone:
                with suppress(OSError):
                    self.disk.delete(key)
            return len(gone), len(gone & self.disk.doomed.keys())

        return self.worker.submit(job, lambda done: None)

    def tend(self) -> None:
        """Have deletions tried again that the disk has refused, every few seconds."""
        if self.disk.doomed and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + _RETRY_SECONDS
            self.worker.submit(self.disk.retry, lambda done: None)

    def forget(self, key: Key) -> None:
        """A session's files are about to go."""
        self.openings.forget(key)
        self.budget.forget(key)

    def _owner(self, session: Session) -> Owner:
        return Owner(
            *session.key, self.disk.server, session.epoch, session.generation, about=self.records.about(session)
        )
