"""Sessions' files in the session directory: written at rest and at commits, deleted, kept within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from pacellm.engine.disk_budget import DiskBudget
from pacellm.engine.openings import Openings
from pacellm.engine.records import Records, ending_metadata
from pacellm.engine.sequence import Sequence
from pacellm.engine.session import Key, Session
from pacellm.engine.sessions import SessionStore
from pacellm.engine.stats import MoverStats
from pacellm.engine.turn import Turn
from pacellm.errors import SessionConflict
from pacellm.memory.disk import Disk, Owner, Sizes
from pacellm.memory.pool import BankPool
from pacellm.memory.tiers import Banks, Worker, copy_banks

Then = Callable[[Future], None]


@dataclass
class Resting:
    """A session at rest, as a save takes it."""

    owner: Owner
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
        owner.about["saved"] = owner.generation
        if state is not None:
            owner.about["stored"] = owner.about["tokens"]
        self.disk.save(owner, log, state, resting.meta)
        resting.seconds = time.monotonic() - started
        return sum(tensor.nbytes for tensor in (state or {}).values())

    def _saved(self, session: Session, resting: Resting, done: Future[tuple[int, Sizes]]) -> None:
        session.moving = False
        self.store.release(session)
        if (error := done.exception()) is not None:
            self.stats.say_failure(session.key, "writing to the session directory", error)
            return
        nbytes, sizes = done.result()
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
        """Take note of a commit, with its log where commits are synced; ``then`` gets the future.

        Args:
            sequence: is committed to the session.
            pool: has the working copy's banks, which become the origin if the log is folded now.
        """
        disk, records = self.disk, self.records
        turn, row = sequence.fed(), sequence.row
        expected = (session.epoch, session.generation)
        owner = self._owner(session)
        owner.generation += 1
        owner.about |= {"stored": None, "saved": owner.generation if disk.sync else session.saved}
        owner.about |= {"tokens": turn.end, "commits": session.commits + 1}
        meta = records.metadata(session, owner.generation)
        meta.pop("ending", None)
        meta |= {
            "tokens": str(turn.end),
            "commits": str(session.commits + 1),
            **ending_metadata(sequence.ending),
        }
        log, origin = [*session.log, turn], session.origin
        if self.store.will_fold(session, turn):
            log, meta["folds"], owner.about["tokens"] = [], str(session.folds + 1), 0
            origin = copy_banks(pool.banks(row)) if pool is not None and row is not None else None

        def job() -> Sizes:
            disk.record(owner, expected, records.log_tensors(log, origin) if disk.sync else None, meta)
            return disk.sizes(session.key)

        def noted(done: Future[Sizes]) -> None:
            then(done)
            if done.exception() is None:
                self._noted(session, done.result())

        self.worker.submit(job, noted)

    def replace_log(self, session: Session, *, before: int) -> Future[Sizes]:
        """Take note of a session that was emptied or replaced, with its log; ``before``: its generation until then."""
        disk, records, owner = self.disk, self.records, self._owner(session)
        log, origin, meta = list(session.log), session.origin, records.metadata(session)
        owner.about |= {"stored": None, "saved": owner.generation}
        expected = (session.epoch, before)
        session.moving = True

        def job() -> Sizes:
            disk.record(owner, expected, records.log_tensors(log, origin), meta)
            return disk.sizes(session.key)

        def then(done: Future[Sizes]) -> None:
            session.moving = False
            if done.exception() is None:
                self._noted(session, done.result())
            if session.deleted:
                self.store.drop(session)
            elif done.exception() is None:
                session.saved, session.foreign = session.generation, False
            elif isinstance(done.exception(), SessionConflict):
                self.store.remove(session)
                self.budget.forget(session.key)

        return self.worker.submit(job, then)

    def recorded(self, session: Session) -> None:
        """After the commit: what of it is on disk."""
        if self.disk.sync:
            session.saved, session.foreign = session.generation, False

    def bury(self, key: Key, *, expired: bool = False) -> Future[bool]:
        """Leave a tombstone."""
        self.forget(key)
        return self.worker.submit(lambda: self.disk.delete(key, expired=expired), lambda done: None)

    def forget(self, key: Key) -> None:
        """A session's files are about to go."""
        self.openings.forget(key)
        self.budget.forget(key)

    def forget_all(self, tenant: str) -> None:
        """All of a tenant's files are about to go."""
        for key in self.openings.of(tenant) | self.budget.of(tenant):
            self.forget(key)

    def _owner(self, session: Session) -> Owner:
        return Owner(
            *session.key, self.disk.server, session.epoch, session.generation, about=self.records.about(session)
        )
