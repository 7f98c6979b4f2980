"""Asking the session directory: taking a session over, and reading its log where memory has an older one or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from pacellm.engine.records import Records
from pacellm.engine.sequence import Sequence
from pacellm.engine.session import Key, Session
from pacellm.engine.sessions import SessionStore
from pacellm.engine.turn import Turn
from pacellm.errors import PaceError, SnapshotRefused, reason
from pacellm.memory.disk import LOG, Disk, Owner, Sizes
from pacellm.memory.tiers import Banks, Worker

logger = logging.getLogger("pacellm.sessions")


@dataclass
class _Opening:
    """Requests and operations that wait for what the disk knows of their session."""

    sequences: list[Sequence] = field(default_factory=list)
    refuse: list[Callable[[PaceError], object]] = field(default_factory=list)


@dataclass
class _Found:
    """What the disk knows of a session: ``metadata`` and ``log`` where memory needs them."""

    owner: Owner | None
    sizes: Sizes = (0, 0)
    log: list[Turn] = field(default_factory=list)
    origin: Banks | None = None
    metadata: dict[str, str] | None = None
    note: str | None = None
    is_refused: bool = False


class Openings:
    """Sessions that the disk is asked about, each once at a time.

    Args:
        store: where what it says is put.
        worker: asks.
        disk, records: None where there is no session directory: then nothing is ever asked.
    """

    def __init__(self, store: SessionStore, worker: Worker, disk: Disk | None, records: Records | None) -> None:
        self.store, self.worker, self.disk, self.records = store, worker, disk, records
        self._asked: dict[Key, _Opening] = {}
        self.on_sizes: Callable[[Key, Sizes, float], None] = lambda key, sizes, last_used: None
        self.refused: list[tuple[Sequence, PaceError]] = []
        self.num_refused = 0

    def is_open(self, sequence: Sequence) -> bool:
        """What the disk knows of the request's session has been asked. Asks where it was not."""
        key = sequence.request.session
        if key is None or self.disk is None:
            return True
        session = self.store.get(key)
        if sequence.claimed and (session is None or not session.stub):
            return True
        self.open(key, sequence)
        return False

    def open(
        self, key: Key, sequence: Sequence | None = None, refuse: Callable[[PaceError], object] | None = None
    ) -> None:
        """Take the session over on disk, and read its log where memory has an older one or none.

        Args:
            sequence: waits for it, and is refused where that fails. refuse: told the same.
        """
        opening, is_new = self._asked.get(key), key not in self._asked
        if opening is None:
            opening = self._asked[key] = _Opening()
        if sequence is not None and sequence not in opening.sequences:
            opening.sequences.append(sequence)
        if refuse is not None:
            opening.refuse.append(refuse)
        if not is_new:
            return
        session = self.store.get(key)
        known = None if session is None or session.stub else session.generation
        self.worker.submit(lambda: self._claim(key, known), lambda done: self._opened(key, opening, done))

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
        assert self.disk is not None
        assert self.records is not None
        owner = self.disk.claim(key)
        found = _Found(owner, self.disk.sizes(key))
        if owner is None or owner.deleted or (known is not None and known >= owner.generation):
            return found
        try:
            with self.disk.open(key, LOG) as (tensors, metadata):
                found.log, found.origin = self.records.take_log(dict(tensors), metadata)
                found.metadata = metadata
        except FileNotFoundError:
            found.note = "the session's log was never written"
        except (SnapshotRefused, OSError) as error:
            found.note, found.is_refused = f"{LOG} was refused: {error}", True
        return found

    def _opened(self, key: Key, opening: _Opening, done: Future[_Found]) -> None:
        if self._asked.get(key) is not opening:
            return  # deleted meanwhile: what was found there is no more
        del self._asked[key]
        try:
            self._take(key, done.result())
        except Exception as error:
            refused = error if isinstance(error, PaceError) else self._unreadable(key, error)
            self.refused += [(sequence, refused) for sequence in opening.sequences]
            for refuse in opening.refuse:
                refuse(refused)
            return
        for sequence in opening.sequences:
            sequence.claimed = True

    def _unreadable(self, key: Key, error: Exception) -> PaceError:
        logger.warning("session %r: cannot be opened: %s", key[1], str(error), exc_info=error)
        return PaceError(f"the session directory cannot be read: {reason(error)}")

    def _take(self, key: Key, found: _Found) -> None:
        """Memory learns what the disk knows."""
        session = self.store.get(key)
        if found.owner is None:
            if session is not None and session.stub:
                self.store.remove(session, lost=True)  # its folder is gone
            return
        if not found.owner.deleted:
            self.on_sizes(key, found.sizes, float(found.owner.about.get("last_used", found.owner.changed)))
        if found.owner.deleted:
            self._buried(key, found.owner, session)
        elif found.metadata is not None or found.note is not None:
            self._take_over(key, found, session)
        elif session is not None:
            session.epoch = found.owner.epoch

    def _buried(self, key: Key, grave: Owner, session: Session | None) -> None:
        """It was deleted, here or by another server; the next commit goes on from the tombstone's generation."""
        if session is not None and session.generation >= grave.generation:
            return
        if session is not None:
            if session.busy:
                return
            self.store.remove(session)
        fresh = self.store.open(key)
        fresh.epoch, fresh.generation, fresh.foreign = grave.epoch, grave.generation, False
        if grave.expired:
            fresh.status = "lost"

    def _take_over(self, key: Key, found: _Found, session: Session | None) -> None:
        """Disk knows better than memory: its log becomes the session's."""
        assert found.owner is not None
        assert self.records is not None
        if session is not None and (session.busy or session.moving):
            return
        if session is not None:
            self.store.remove(session)
        session = self.from_owner(found.owner)
        session.stub = False
        self.store.add(session)
        session.note, session.foreign = found.note, found.is_refused
        if found.metadata is None:
            session.status, session.commits, session.stored, session.saved = "lost", 0, None, None
            self.store.losses += 1
            self.num_refused += found.is_refused
            logger.warning("session %r of tenant %r: %s", key[1], key[0], found.note)
            return
        self.records.take_facts(session, found.metadata)
        self.store.put_log_in(session, found.log, found.origin)
        written = int(found.metadata["generation"])
        if written != found.owner.generation:
            missing = found.owner.generation - written
            session.note = f"{missing} later commit(s) were not on disk when their server ended"
            session.stored = session.ending = None
            logger.warning("session %r of tenant %r: %s", key[1], key[0], session.note)
        session.saved = session.generation if written == session.generation else None

    def from_owner(self, owner: Owner) -> Session:
        """A session that is on disk only."""
        about = owner.about
        session = Session((owner.tenant, owner.id), stub=True, num_tokens=int(about.get("tokens", 0)))
        session.epoch, session.generation = owner.epoch, owner.generation
        session.created = float(about.get("created", owner.changed))
        session.last_used = float(about.get("last_used", owner.changed))
        session.ttl, session.commits = about.get("ttl"), int(about.get("commits", 0))
        session.kept = bool(about.get("kept", False))
        session.banks = {int(layer): facts for layer, facts in about.get("banks", {}).items()}
        session.stored, session.saved = about.get("stored"), about.get("saved")
        return session
