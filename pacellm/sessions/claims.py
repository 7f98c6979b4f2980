"""Asking the session directory: taking a session over, and reading its log where memory has an older one or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from pacellm.engine.sequence import Sequence
from pacellm.errors import PaceError, SnapshotRefused, reason
from pacellm.memory.state import Banks
from pacellm.sessions.disk import LOG, Disk
from pacellm.sessions.disk_usage import DiskUsage
from pacellm.sessions.folder import Sizes
from pacellm.sessions.owner import About, Owner, OwnerRefused, parse_owner
from pacellm.sessions.records import Facts, Records
from pacellm.sessions.session import Key, Session
from pacellm.sessions.store import SessionStore
from pacellm.sessions.turn import Turn
from pacellm.sessions.worker import Worker

logger = logging.getLogger("pacellm.sessions")


@dataclass
class _Asked:
    """Requests and operations that wait for what the disk knows of their session."""

    sequences: list[Sequence] = field(default_factory=list)
    refuse: list[Callable[[PaceError], object]] = field(default_factory=list)


@dataclass
class _Found:
    """What the disk knows of a session: ``facts`` and ``log`` where memory needs them.

    Attributes:
        note: what was refused on the way. ``is_lost``: the log was, or is not there.
        is_foreign: the log stays, set aside, where another takes its place.
    """

    owner: Owner | None
    sizes: Sizes = field(default_factory=Sizes)
    log: list[Turn] = field(default_factory=list)
    origin: Banks | None = None
    facts: Facts | None = None
    note: str | None = None
    is_lost: bool = False
    is_foreign: bool = False


class DirectoryClaims:
    """Sessions that the disk is asked about, each once at a time.

    Args:
        store: where what it says is put.
        worker: asks.
        usage: is told how much lies there.
        disk, records: None where there is no session directory: then nothing is ever asked.
    """

    def __init__(
        self, store: SessionStore, worker: Worker, usage: DiskUsage, disk: Disk | None, records: Records | None
    ) -> None:
        self._store, self._worker, self._usage, self._disk, self._records = store, worker, usage, disk, records
        self._asked: dict[Key, _Asked] = {}
        self._refused: list[tuple[Sequence, PaceError]] = []
        self.num_refused = 0

    def is_settled(self, sequence: Sequence) -> bool:
        """What the disk knows of the request's session has been asked. Asks where it was not."""
        key = sequence.request.session
        if key is None or self._disk is None:
            return True
        session = self._store.get(key)
        if sequence.claimed and (session is None or not session.stub):
            return True
        self.ask(key, sequence)
        return False

    def ask(
        self, key: Key, sequence: Sequence | None = None, refuse: Callable[[PaceError], object] | None = None
    ) -> None:
        """Take the session over on disk, and read its log where memory has an older one or none.

        Args:
            sequence: waits for it, and is refused where that fails. refuse: told the same.
        """
        asked, is_new = self._asked.get(key), key not in self._asked
        if asked is None:
            asked = self._asked[key] = _Asked()
        if sequence is not None and sequence not in asked.sequences:
            asked.sequences.append(sequence)
        if refuse is not None:
            asked.refuse.append(refuse)
        if not is_new:
            return
        session = self._store.get(key)
        known = None if session is None or session.stub else session.generation
        self._worker.submit(
            lambda: self._claim(key, known), lambda done: self._answered(key, asked, done), needs_room=True
        )

    def take_refused(self) -> list[tuple[Sequence, PaceError]]:
        """Requests whose sessions the disk has not given since this was last asked, and why."""
        refused, self._refused = self._refused, []
        return refused

    def forget(self, key: Key) -> None:
        """What the disk says about a session is out of date before it is heard."""
        self._asked.pop(key, None)

    def of(self, tenant: str) -> set[Key]:
        """A tenant's sessions that the disk is being asked about."""
        return {key for key in self._asked if key[0] == tenant}

    def is_asking(self, key: Key) -> bool:
        """The disk is being asked."""
        return key in self._asked

    def _claim(self, key: Key, known: int | None) -> _Found:
        """In the worker."""
        assert self._disk is not None
        assert self._records is not None
        claim = self._disk.claim(key)
        owner = claim.owner
        found = _Found(owner, self._disk.sizes(key), note=claim.note)
        if owner is None or owner.deleted or (known is not None and known >= owner.generation):
            return found
        try:
            with self._disk.open(key, LOG) as (tensors, metadata):
                facts = self._records.facts(metadata)
                found.log, found.origin = self._records.take_log(dict(tensors), metadata)
                found.facts = facts
                if facts.generation > owner.generation:  # its server died before owner.json was as new
                    owner.about = _about(metadata) or owner.about
        except FileNotFoundError:
            found.note, found.is_lost = "the session's log was never written", True
        except SnapshotRefused as error:
            found.note, found.is_lost, found.is_foreign = f"{LOG} was refused: {error}", True, True
        return found

    def _answered(self, key: Key, asked: _Asked, done: Future[_Found]) -> None:
        if self._asked.get(key) is not asked:
            return  # deleted meanwhile: what was found there is no more
        del self._asked[key]
        try:
            self._take(key, done.result())
        except Exception as error:
            refused = error if isinstance(error, PaceError) else self._unreadable(key, error)
            self._refused += [(sequence, refused) for sequence in asked.sequences]
            for refuse in asked.refuse:
                refuse(refused)
            return
        for sequence in asked.sequences:
            sequence.claimed = True

    def _unreadable(self, key: Key, error: Exception) -> PaceError:
        logger.warning("session %r: cannot be opened: %s", key[1], str(error), exc_info=error)
        return PaceError(f"the session cannot be opened in the session directory: {reason(error)}")

    def _take(self, key: Key, found: _Found) -> None:
        """Memory learns what the disk knows."""
        session, owner = self._store.get(key), found.owner
        if owner is None:
            self._gone(key, found, session)
        elif owner.deleted:
            self._buried(key, owner, session)
        else:
            about = owner.about
            self._usage.note(key, found.sizes, owner.changed if about.last_used is None else about.last_used)
            if found.facts is not None or found.is_lost:
                self._take_over(key, owner, found, session)
            elif session is not None:
                session.epoch, session.seen, session.note = owner.epoch, owner.seen, found.note or session.note

    def _gone(self, key: Key, found: _Found, session: Session | None) -> None:
        """There is no such session on disk, or nothing is left there that tells of it."""
        if session is not None and not session.stub:
            session.seen = None  # memory has it whole
            return
        if session is not None:
            self._store.remove(session, lost=True)
        if found.note is not None:
            fresh = self._store.open(key)
            fresh.foreign = True  # what is left there is kept
            self._say_lost(fresh, found.note)

    def _say_lost(self, session: Session, note: str) -> None:
        session.status, session.note = "lost", note
        self._store.losses += 1
        logger.warning("session %r of tenant %r: %s", session.key[1], session.key[0], note)

    def _buried(self, key: Key, grave: Owner, session: Session | None) -> None:
        """It was deleted, here or by another server; the next commit goes on from the tombstone's generation."""
        if session is not None and session.generation >= grave.generation:
            return
        if session is not None:
            if session.busy:
                return
            self._store.remove(session)
        fresh = self._store.open(key)
        fresh.epoch, fresh.generation, fresh.seen, fresh.foreign = grave.epoch, grave.generation, grave.seen, False
        if grave.expired:
            fresh.status = "lost"

    def _take_over(self, key: Key, owner: Owner, found: _Found, session: Session | None) -> None:
        """Disk knows better than memory: its log becomes the session's."""
        if session is not None and (session.busy or session.moving):
            return
        if session is not None:
            self._store.remove(session)
        session = stub_of(owner)
        session.stub = False
        self._store.add(session)
        session.note, session.foreign = found.note, found.is_foreign
        self.num_refused += found.is_foreign
        if found.facts is None:
            session.commits, session.stored, session.saved = 0, None, None
            self._say_lost(session, found.note or f"{LOG} is missing")
            return
        found.facts.give(session)
        self._store.put_log_in(session, found.log, found.origin)
        _catch_up(session, found.facts.generation, owner.generation)
        if session.note is not None:
            logger.warning("session %r of tenant %r: %s", key[1], key[0], session.note)


def _about(metadata: dict[str, str]) -> About | None:
    """What a log tells that was written with it; None where it is of the time before logs did."""
    with suppress(OwnerRefused):
        return parse_owner(metadata.get("owner", "")).about
    return None


def _catch_up(session: Session, written: int, known: int) -> None:
    """A session's log has the generation ``written`` where its owner knows of ``known``."""
    missing = known - written
    if missing:
        session.stored = None
    if missing > 0:
        session.note = f"{missing} later commit(s) were not on disk when their server ended"
        session.ending = None
    session.generation = max(written, known)
    session.saved = session.generation if written == session.generation else None


def stub_of(owner: Owner) -> Session:
    """A session that is on disk only."""
    about = owner.about
    session = Session((owner.tenant, owner.id), stub=True, num_tokens=about.tokens)
    session.epoch, session.generation, session.seen = owner.epoch, owner.generation, owner.seen
    session.created = owner.changed if about.created is None else about.created
    session.last_used = owner.changed if about.last_used is None else about.last_used
    session.ttl, session.commits, session.kept = about.ttl, about.commits, about.kept
    session.banks, session.stored, session.saved = about.banks, about.stored, about.saved
    session.ranks, session.parent = about.ranks, about.parent
    return session
