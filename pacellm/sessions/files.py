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
from pacellm.kv.history import History
from pacellm.memory.pool import BankPool
from pacellm.memory.state import Banks, copy_banks
from pacellm.sessions.budget import DiskBudget
from pacellm.sessions.claims import stub_of
from pacellm.sessions.deletions import Deletions
from pacellm.sessions.disk import STATE, Disk
from pacellm.sessions.disk_usage import DiskUsage
from pacellm.sessions.folder import Sizes
from pacellm.sessions.owner import Owner, Seen
from pacellm.sessions.records import Records, ending_metadata
from pacellm.sessions.session import Session
from pacellm.sessions.stats import MoverStats
from pacellm.sessions.store import SessionStore
from pacellm.sessions.turn import Turn
from pacellm.sessions.worker import Worker

Then = Callable[[Future], None]


@dataclass(frozen=True)
class State:
    """What a save writes of a session's state.

    Attributes:
        tokens: of its KV. history: what lies before.
        tensors: asked for in the worker.
        free: called there at the end, whatever happened.
    """

    tokens: int
    history: History
    tensors: Callable[[], dict[str, Tensor]]
    free: Callable[[], None] = lambda: None


@dataclass
class Resting:
    """A session at rest, as a save takes it. ``refused``: why its state could not be written; its log was."""

    owner: Owner
    seen: Seen | None
    log: list[Turn] | None
    origin: Banks | None
    meta: dict[str, str]
    seconds: float = 0.0
    refused: OSError | None = None


class SessionFiles:
    """Writes sessions into a directory: jobs for the worker, and their bookkeeping in the engine's thread.

    Args:
        store: the sessions. worker: writes them.
        disk: the directory. records: how sessions are written there.
        usage, budget: what lies there, and how much may.
        deletions: who deletes.
        stats: where moves are counted.
    """

    def __init__(
        self,
        store: SessionStore,
        worker: Worker,
        disk: Disk,
        records: Records,
        usage: DiskUsage,
        budget: DiskBudget,
        deletions: Deletions,
        stats: MoverStats,
    ) -> None:
        self._store, self._worker, self._stats = store, worker, stats
        self.disk, self.records = disk, records
        self.usage, self.budget, self.deletions = usage, budget, deletions
        self._is_tidying = False

    @property
    def num_sessions(self) -> int:
        """Sessions that are known, whether or not they were written yet."""
        return len(self._store)

    def find(self) -> None:
        """At start-up: what lies in the directory, as sessions whose logs are on disk only."""
        for owner in sorted(self.disk.owners(), key=lambda owner: owner.changed):
            session = stub_of(owner)
            self._store.add(session)
            if not self.disk.is_elsewhere(owner):
                self.usage.note(session.key, self.disk.sizes(session.key), session.last_used)
        self.budget.trim()

    def tidy(self) -> None:
        """Deletions that the disk has refused, and files of blocks that nobody holds any more."""
        self.deletions.retry()
        self.budget.settle()
        if self.disk.histories.has_gone and not self._is_tidying:
            self._is_tidying = True
            self._worker.submit(self.disk.histories.remove_gone, lambda done: self._tidied())

    def _tidied(self) -> None:
        self._is_tidying = False

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

    def has_room(self, nbytes: int, history: History) -> bool:
        """There is room for a state of ``nbytes`` with what of its history has no file yet."""
        return self.budget.has_room(nbytes + history.host_bytes)

    def save(self, session: Session, state: State | None = None) -> None:
        """Have a session at rest written, and its blocks and row given back then.

        Args:
            state: None writes the log alone, where it is not there yet.
        """
        resting = self.rest(session)
        session.moving = True

        def job() -> tuple[int, Sizes]:
            nonlocal state
            tried, state = state, None  # a second run is for the log alone
            try:
                nbytes = self._write(resting, tried)
            except OSError as error:
                if tried is None or resting.log is None:
                    raise
                resting.refused, resting.owner.about.stored = error, None
                nbytes = self._write(resting, None)
            finally:
                if tried is not None:
                    tried.free()
            return nbytes, self.disk.sizes(session.key)

        self._worker.submit(job, lambda done: self._saved(session, resting, done), needs_room=resting.log is not None)

    def _write(self, resting: Resting, state: State | None) -> int:
        """In the worker; returns bytes of state."""
        started = time.monotonic()
        log = self.records.log_tensors(resting.log, resting.origin) if resting.log is not None else None
        owner, tensors, history = resting.owner, None, History()
        owner.about.saved = owner.generation
        if state is not None:
            owner.about.stored, tensors, history = state.tokens, state.tensors(), state.history
        nbytes = sum(tensor.nbytes for tensor in (tensors or {}).values()) + history.host_bytes
        self.disk.save(owner, resting.seen, log, tensors, resting.meta, history)
        resting.seconds = time.monotonic() - started
        return nbytes

    def _saved(self, session: Session, resting: Resting, done: Future[tuple[int, Sizes]]) -> None:
        session.moving = False
        self._store.release(session)
        if (error := done.exception()) is not None:
            self._stats.say_failure(session.key, "writing to the session directory", error)
            return
        if resting.refused is not None:
            self._stats.say_failure(session.key, "writing its state beside its log", resting.refused)
        nbytes, sizes = done.result()
        session.seen = resting.owner.seen
        if not session.deleted and session.generation == resting.owner.generation:
            session.saved, session.foreign = session.generation, False
            if nbytes:
                session.stored = resting.owner.about.stored
                self._stats.count_spill(nbytes, resting.seconds)
        self._noted(session, sizes)

    def _noted(self, session: Session, sizes: Sizes) -> None:
        if session.deleted:
            return  # a tombstone takes the files' place, or somebody else has them
        self.usage.note(session.key, sizes, session.last_used)
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
        if self._store.will_fold(session, turn):
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
                self._stats.say_failure(session.key, "noting a commit", found)
            elif found is not None:
                session.seen = owner.seen
            then(done)
            if isinstance(found, tuple):
                self._noted(session, found)

        self._worker.submit(job, noted, needs_room=True)

    def replace_log(self, session: Session) -> Future[Sizes]:
        """Take note of a session that was emptied or replaced, with its log."""
        disk, records, seen, owner = self.disk, self.records, session.seen, self._owner(session)
        log, origin, meta = list(session.log), session.origin, records.metadata(session)
        owner.about.stored, owner.about.saved = None, owner.generation
        session.moving = True

        def job() -> Sizes:
            disk.record(owner, seen, records.log_tensors(log, origin), meta)
            with suppress(OSError):  # it is of another generation, and goes when the next is written
                disk.drop(session.key, STATE)
            return disk.sizes(session.key)

        def then(done: Future[Sizes]) -> None:
            session.moving = False
            error = done.exception()
            if error is None:
                session.seen = owner.seen
                self._noted(session, done.result())
            elif not isinstance(error, SessionConflict):
                self._stats.say_failure(session.key, "writing a changed session", error)
            if session.deleted:
                self._store.drop(session)
            elif error is None:
                session.saved, session.foreign = session.generation, False
            elif isinstance(error, SessionConflict):
                self._store.remove(session)
                self.usage.forget(session.key)

        return self._worker.submit(job, then, needs_room=True)

    def recorded(self, session: Session) -> None:
        """After the commit: what of it is on disk."""
        if self.disk.sync:
            session.saved, session.foreign = session.generation, False

    def _owner(self, session: Session) -> Owner:
        return Owner(
            *session.key, self.disk.server, session.epoch, session.generation, about=self.records.about(session)
        )
