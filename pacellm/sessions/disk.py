"""Sessions in a directory: one folder each, whose name tells nothing, with everything in it replaced atomically.

::

    DIR/key                     32 random bytes: names folders and signs files; 0600
    DIR/servers/ID              locked by the running server of that id, so that others know it lives
    DIR/history/ID/             blocks of histories of that server that no state lists yet
    DIR/HMAC(tenant, id)/       0700
        lock                    held while any server reads or changes the folder
        owner.json              who owns the session, its generation (commits so far), what a list shows; a tombstone
                                where it was deleted; under a keyed digest
        log.safetensors         the log: the session itself, and what owner.json said when it was written
        state.safetensors       KV and banks of one generation: a cache of the log; it lists what has left the window
        history.*.safetensors   as blocks, which never change: each is written once, and linked from forks' folders
        *.refused               files that were damaged or of another model, kept

A file is written beside its place, synced where asked, and renamed; blocks are there before the state that lists them,
and those that it does not list go after it. Several servers may share DIR: opening a session takes it over (its *epoch*
grows), and a commit is refused where ``owner.json`` is not what this server last saw.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from pacellm.errors import ConfigError, SessionConflict, SnapshotRefused
from pacellm.kv.history import History
from pacellm.sessions import format as snapshot
from pacellm.sessions.atomic import Unsettled, is_full, set_aside
from pacellm.sessions.folder import (
    LOG,
    OWNER,
    STATE,
    Claim,
    Files,
    Sizes,
    known,
    locked,
    log_generation,
    name_of,
    owner_of,
    put,
    remove_files,
    sizes_of,
)
from pacellm.sessions.history_files import HistoryFiles
from pacellm.sessions.owner import Owner, OwnerRefused, Seen
from pacellm.sessions.read_ahead import reading_ahead
from pacellm.sessions.servers import Servers
from pacellm.sessions.session import Key

logger = logging.getLogger("pacellm.sessions")
_TOMBSTONE_DAYS = 7
_FOLDER = re.compile(r"[0-9a-f]{40}")


class Disk:
    """A session directory. Its methods block on the disk: call them from the worker's thread.

    Args:
        directory: created where it is missing.
        sync: whether commits write and sync the log.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, directory: str | Path, *, sync: bool = False) -> None:
        self.directory, self.sync = Path(directory), sync
        self.doomed: dict[Key, bool] = {}  # sessions whose deletion is not on disk yet; True where their time had come
        try:
            self.servers = Servers(self.directory)
            self.secret = self._secret()
        except OSError as error:
            raise ConfigError(f"session directory {directory} cannot be used: {error}", param="session_dir") from error
        self.server = self.servers.own
        self.histories = HistoryFiles(self.servers.blocks, self.secret, sync=sync)
        self._tidy()

    def close(self) -> None:
        """This server's sessions may be taken over by others."""
        if not self.servers.is_closed:
            self.histories.close()
            self.servers.close()

    def folder(self, key: Key) -> Path:
        """Where a session lies."""
        return self.directory / name_of(key, self.secret)

    # -- owning --------------------------------------------------------------------------------------------

    def owners(self) -> Iterator[Owner]:
        """Every session that is here and not deleted; what cannot be read is named in the log."""
        for folder in self._folders():
            try:
                found = known(folder, self.secret)
            except OSError as error:
                found = Claim(None, str(error))
            if found.note is not None:
                logger.warning("session folder %s: %s", folder.name, found.note)
            if found.owner is not None and not found.owner.deleted:
                yield found.owner

    def claim(self, key: Key) -> Claim:
        """Take a session over for this server. A damaged ``owner.json`` is set aside, and the log tells instead.

        Where the folder cannot be written, and commits need not be on disk, what it says is good enough.

        Raises:
            SessionConflict: a living server owns commits that are not on disk.
            OSError: the folder cannot be read, or not taken over where it must be.
        """
        folder = self.folder(key)
        if key in self.doomed:
            with suppress(OSError):
                self.delete(key, expired=self.doomed[key])
        if key in self.doomed:
            return Claim(self._grave(key, known(folder, self.secret).owner, self.doomed[key]))
        if not folder.is_dir():
            return Claim(None)
        try:
            with locked(folder):
                return self._take_over(folder)
        except OSError as error:
            if self.sync:
                raise
            found = known(folder, self.secret)
            if found.owner is not None and not found.owner.deleted and self.is_elsewhere(found.owner):
                raise
            logger.warning("session folder %s is read without being taken over: %s", folder.name, str(error))
            return found

    def _take_over(self, folder: Path) -> Claim:
        found = known(folder, self.secret)
        owner = found.owner
        if found.note is not None:
            set_aside(folder / OWNER)
        elif owner is None or owner.deleted or owner.server == self.server:
            return found
        if owner is None:
            return found
        if self.is_elsewhere(owner) and log_generation(folder) < owner.generation:
            raise SessionConflict("another running server holds this session's latest commits")
        owner.server, owner.epoch = self.server, owner.epoch + 1
        if self.sync:
            self._put(folder, owner)
        else:
            put(folder, self.secret, owner, sync=True)
        return found

    def record(self, owner: Owner, seen: Seen | None, log: dict[str, Tensor] | None, meta: dict[str, str]) -> None:
        """A commit: ``owner`` carries the new generation; with ``log`` both are synced.

        Args:
            seen: what ``owner.json`` last said to this server; None where there was none.

        Raises:
            SessionConflict: it says something else now: the session has another owner, or was deleted by one.
            OSError: the disk is full, say; nothing has changed.
        """
        with self._changing(owner, seen) as folder:
            self._put(folder, owner, {} if log is None else {LOG: log}, meta, sync=log is not None)

    def save(
        self,
        owner: Owner,
        seen: Seen | None,
        log: dict[str, Tensor] | None,
        state: dict[str, Tensor] | None,
        meta: dict[str, str],
        history: History,
    ) -> None:
        """Write a session at rest: its state, and its log where it is not there yet, under its present generation.

        Args:
            history: of the state: what lies before its KV.

        Raises:
            SessionConflict: see :meth:`record`.
            OSError: what was there before is still there, but for a state with a history.
        """
        tensors = {name: found for name, found in ((STATE, state), (LOG, log)) if found is not None}
        is_synced = self.sync or log is not None
        with self._changing(owner, seen) as folder:
            try:
                if state is not None:
                    state |= self.histories.place(folder, history)
                put(folder, self.secret, owner, tensors, meta, sync=is_synced, sync_states=self.sync)
            except OSError as error:
                if state is not None and history.blocks and not isinstance(error, Unsettled):
                    self._drop_state(folder)  # of another generation: what is written next needs the room
                raise
            if state is not None:
                with suppress(OSError):  # the next state's turn
                    self.histories.sweep(folder, history)

    @contextmanager
    def _changing(self, owner: Owner, seen: Seen | None) -> Iterator[Path]:
        """A session's folder, which is as this server has last seen it."""
        key = owner.tenant, owner.id
        if key in self.doomed:
            self.delete(key, expired=self.doomed[key])  # what was deleted goes before anything takes its place
        folder = self.folder(key)
        self.histories.measure()
        with locked(folder):
            self._expect(folder, seen)
            yield folder

    def _put(
        self,
        folder: Path,
        owner: Owner,
        files: Files | None = None,
        meta: dict[str, str] | None = None,
        *,
        sync: bool = True,
    ) -> None:
        """Write what is worth more than the session's state, which on a full disk gives way: its log brings it back."""
        try:
            put(folder, self.secret, owner, files, meta, sync=sync)
        except OSError as error:
            if not is_full(error):
                raise
            self._drop_state(folder)
            owner.about.stored = None
            put(folder, self.secret, owner, files, meta, sync=sync)

    def _drop_state(self, folder: Path) -> None:
        with suppress(OSError):
            (folder / STATE).unlink(missing_ok=True)
            self.histories.sweep(folder, History())

    # -- deleting ------------------------------------------------------------------------------------------

    def delete(self, key: Key, *, expired: bool = False) -> bool:
        """Leave a synced tombstone, then remove the files. False where there was no session.

        Raises:
            OSError: not now. The session is ``doomed``: for this server it is gone, and :meth:`retry` tries again.
        """
        folder = self.folder(key)
        was_there = False
        try:
            if folder.is_dir():
                with locked(folder):
                    was_there = self._bury(folder, key, expired)
        except OSError:
            self.doomed[key] = expired
            raise
        self.doomed.pop(key, None)
        return was_there

    def retry(self) -> int:
        """Delete what could not be deleted before; how many sessions are left."""
        for key, expired in list(self.doomed.items()):
            with suppress(OSError):
                self.delete(key, expired=expired)
        return len(self.doomed)

    def _bury(self, folder: Path, key: Key, expired: bool) -> bool:
        found = known(folder, self.secret).owner
        grave = self._grave(key, found, expired)
        try:
            put(folder, self.secret, grave, sync=True)
        except OSError:  # a full disk: what is to go makes the room
            remove_files(folder)
            put(folder, self.secret, grave, sync=True)
        remove_files(folder)
        return found is not None and not found.deleted

    def _grave(self, key: Key, owner: Owner | None, expired: bool) -> Owner:
        """The tombstone that is to stand in ``owner``'s place, or stands there and is this server's. However often
        it is tried it is the same: what memory has begun since goes on from it."""
        epoch, generation = (owner.epoch, owner.generation) if owner is not None else (0, 0)
        if owner is None or not owner.deleted or owner.server != self.server:
            epoch, generation = epoch + 1, generation + 1
        return Owner(*key, self.server, epoch, generation, deleted=True, expired=expired)

    def drop(self, key: Key, *names: str) -> None:
        """Remove files of a session that no other running server owns; with its state go the blocks that it lists."""
        folder = self.folder(key)
        if not folder.exists():
            return
        with locked(folder):
            owner = known(folder, self.secret).owner
            if owner is None or not self.is_elsewhere(owner):
                for name in names:
                    (folder / name).unlink(missing_ok=True)
                if STATE in names:
                    self.histories.sweep(folder, History())

    def is_elsewhere(self, owner: Owner) -> bool:
        """Another running server owns it."""
        return owner.server != self.server and self.servers.is_running(owner.server)

    # -- reading -------------------------------------------------------------------------------------------

    @contextmanager
    def parse(self, key: Key, name: str) -> Iterator[snapshot.Parsed]:
        """A file, valid inside the block; its data is yet to be verified.

        Raises:
            SnapshotRefused: its header is damaged. FileNotFoundError: it is not there.
        """
        path = self.folder(key) / name
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise SnapshotRefused("snapshot is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            with reading_ahead(file):
                try:
                    yield snapshot.parse(memoryview(mapped))
                finally:
                    with suppress(BufferError):  # a tensor still looks at it: it goes with the tensor
                        mapped.close()

    @contextmanager
    def open(self, key: Key, name: str) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
        """A file's tensors, valid inside the block, and its metadata.

        Raises:
            SnapshotRefused: it is damaged. FileNotFoundError: it is not there.
        """
        with self.parse(key, name) as parsed:
            parsed.verify(self.secret)
            yield parsed.tensors, parsed.metadata

    def sizes(self, key: Key) -> Sizes:
        """Bytes of a session's files."""
        return sizes_of(self.folder(key))

    # -- within a folder -----------------------------------------------------------------------------------

    def _expect(self, folder: Path, seen: Seen | None) -> None:
        try:
            found = owner_of(folder, self.secret)
        except OwnerRefused as error:  # this server's memory, which has asked before, is the better source
            logger.warning("session folder %s: %s", folder.name, str(error))
            set_aside(folder / OWNER)
            return
        if found is not None and found.seen != seen:
            raise SessionConflict("another server has changed or deleted this session; send the request again")

    # -- the directory -------------------------------------------------------------------------------------

    def _secret(self) -> bytes:
        path = self.directory / "key"
        if not path.exists():
            draft = self.directory / f"key.{self.servers.own}"
            with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(os.urandom(32))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(draft, path)  # the first server's key stays
            draft.unlink()
        secret = path.read_bytes()
        if len(secret) != 32:
            raise OSError(f"{path} has {len(secret)} bytes, not 32")
        return secret

    def _tidy(self) -> None:
        """Remove marks and blocks of dead servers, half-written files nobody writes any more, what deleted sessions
        have left, and old tombstones."""
        self.servers.tidy()
        for folder in self._folders():
            try:
                self._tidy_folder(folder)
            except OSError as error:
                logger.warning("session folder %s cannot be tidied: %s", folder.name, str(error))

    def _tidy_folder(self, folder: Path) -> None:
        with locked(folder):
            for draft in folder.glob("*.draft"):
                draft.unlink(missing_ok=True)
            owner = known(folder, self.secret).owner
            if owner is None or not owner.deleted:
                return
            remove_files(folder)
            if time.time() - owner.changed > _TOMBSTONE_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Those of sessions, by name."""
        return sorted(path for path in self.directory.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir())
