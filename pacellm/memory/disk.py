"""Sessions in a directory: one folder each, whose name tells nothing, with everything in it replaced atomically.

::

    DIR/key                     32 random bytes: names folders and signs files; 0600
    DIR/servers/ID              locked by the running server of that id, so that others know it lives
    DIR/HMAC(tenant, id)/       0700
        lock                    held while any server reads or changes the folder
        owner.json              who owns the session, its generation (commits so far), what a list shows; a tombstone
                                where it was deleted
        log.safetensors         the log: the session itself
        state.safetensors       KV and banks of one generation: a cache of the log

A file is written beside its place, synced where asked, and renamed. Several servers may share DIR: opening a session
takes it over (its *epoch* grows), and a commit under an old epoch or generation is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from pacellm.errors import ConfigError, SessionConflict, SnapshotRefused
from pacellm.memory import snapshot

logger = logging.getLogger("pacellm.memory")
_TOMBSTONE_DAYS = 7
_AHEAD = 8 * 2**20
Sizes = tuple[int, int]
LOG, STATE = "log.safetensors", "state.safetensors"


@dataclass
class Owner:
    """Contents of ``owner.json``.

    Attributes:
        server: id of the owning server.
        epoch: how often the session has changed hands.
        generation: commits, resets and deletes so far, whether or not their log was written.
        deleted: the rest is a tombstone. ``expired``: its time had come.
        about: what a list shows: tokens, created, last_used, ttl and so on.
    """

    tenant: str
    id: str
    server: str
    epoch: int = 1
    generation: int = 0
    deleted: bool = False
    expired: bool = False
    changed: float = field(default_factory=time.time)
    about: dict[str, Any] = field(default_factory=dict)


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
        self.server = uuid.uuid4().hex
        try:
            (self.directory / "servers").mkdir(mode=0o700, parents=True, exist_ok=True)
            self.secret = self._secret()
            self._life = os.open(self.directory / "servers" / self.server, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._life, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"session directory {directory} cannot be used: {error}", param="session_dir") from error
        self._tidy()

    def close(self) -> None:
        """This server's sessions may be taken over by others."""
        if self._life >= 0:
            with suppress(FileNotFoundError):
                (self.directory / "servers" / self.server).unlink()
            os.close(self._life)
            self._life = -1

    def folder(self, key: tuple[str, str]) -> Path:
        """Where a session lies."""
        name = "\0".join(key).encode()
        return self.directory / hmac.new(self.secret, name, hashlib.sha256).hexdigest()[:40]

    # -- owning --------------------------------------------------------------------------------------------

    def owners(self) -> Iterator[Owner]:
        """Every session that is here and not deleted; unreadable folders are named in the log."""
        for folder in sorted(self.directory.iterdir()):
            if folder.name not in ("servers", "key") and folder.is_dir():
                owner = self._owner(folder)
                if owner is not None and not owner.deleted:
                    yield owner

    def claim(self, key: tuple[str, str]) -> Owner | None:
        """Take a session over for this server. None where there was never one.

        Raises:
            SessionConflict: a living server owns commits that are not on disk.
        """
        folder = self.folder(key)
        if not (folder / "owner.json").exists():
            return None
        with self._locked(folder):
            owner = self._owner(folder)
            if owner is None or owner.deleted or owner.server == self.server:
                return owner
            if self._lives(owner.server) and self._log_generation(folder) < owner.generation:
                raise SessionConflict("another running server holds this session's latest commits")
            owner.server, owner.epoch = self.server, owner.epoch + 1
            self._put_owner(folder, owner)
            return owner

    def record(
        self, owner: Owner, expected: tuple[int, int], log: dict[str, Tensor] | None, meta: dict[str, str]
    ) -> None:
        """A commit: ``owner`` carries the new generation; with ``log`` it is written and synced first.

        Args:
            expected: (epoch, generation) that this server knows.

        Raises:
            SessionConflict: the session has another owner, generation, or was deleted by one.
            OSError: the disk is full, say; nothing has changed.
        """
        folder = self.folder((owner.tenant, owner.id))
        with self._locked(folder):
            self._expect(folder, owner, expected)
            if log is not None:
                self._put(folder / LOG, log, meta, sync=True)
            self._put_owner(folder, owner, sync=log is not None)

    def save(
        self, owner: Owner, log: dict[str, Tensor] | None, state: dict[str, Tensor] | None, meta: dict[str, str]
    ) -> None:
        """Write a session at rest: its state, then its log where it is not there yet, under its present generation.

        Raises:
            SessionConflict: see :meth:`record`.
            OSError: what was there before is still there.
        """
        folder = self.folder((owner.tenant, owner.id))
        with self._locked(folder):
            self._expect(folder, owner, (owner.epoch, owner.generation))
            if state is not None:
                self._put(folder / STATE, state, meta, sync=self.sync)
            if log is not None:
                self._put(folder / LOG, log, meta, sync=True)
            self._put_owner(folder, owner)

    def delete(self, key: tuple[str, str], *, expired: bool = False) -> bool:
        """Leave a synced tombstone, then remove the files. False where there was no session."""
        folder = self.folder(key)
        if not (folder / "owner.json").exists():
            return False
        with self._locked(folder):
            owner = self._owner(folder)
            was_there = owner is not None and not owner.deleted
            generation, epoch = (owner.generation, owner.epoch) if owner is not None else (0, 0)
            grave = Owner(*key, self.server, epoch + 1, generation + 1, deleted=True, expired=expired)
            self._put_owner(folder, grave, sync=True)
            for path in folder.iterdir():
                if path.name not in ("lock", "owner.json"):
                    path.unlink()
            return was_there

    def drop(self, key: tuple[str, str], *names: str) -> None:
        """Remove files of a session that no other running server owns."""
        folder = self.folder(key)
        if not folder.exists():
            return
        with self._locked(folder):
            owner = self._owner(folder)
            if owner is None or not self.is_elsewhere(owner):
                for name in names:
                    (folder / name).unlink(missing_ok=True)

    def is_elsewhere(self, owner: Owner) -> bool:
        """Another running server owns it."""
        return owner.server != self.server and self._lives(owner.server)

    # -- reading -------------------------------------------------------------------------------------------

    @contextmanager
    def parse(self, key: tuple[str, str], name: str) -> Iterator[snapshot.Parsed]:
        """A file, valid inside the block; its data is yet to be verified.

        Raises:
            SnapshotRefused: its header is damaged. FileNotFoundError: it is not there.
        """
        path = self.folder(key) / name
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise SnapshotRefused("snapshot is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            with _reading_ahead(file):
                try:
                    yield snapshot.parse(memoryview(mapped))
                finally:
                    with suppress(BufferError):  # a tensor still looks at it: it goes with the tensor
                        mapped.close()

    @contextmanager
    def open(self, key: tuple[str, str], name: str) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
        """A file's tensors, valid inside the block, and its metadata.

        Raises:
            SnapshotRefused: it is damaged. FileNotFoundError: it is not there.
        """
        with self.parse(key, name) as parsed:
            parsed.verify(self.secret)
            yield parsed.tensors, parsed.metadata

    def sizes(self, key: tuple[str, str]) -> Sizes:
        """(bytes of the log and what else is kept of a session, bytes of its state)."""
        log = state = 0
        with suppress(FileNotFoundError), os.scandir(self.folder(key)) as files:
            for file in files:
                size = file.stat().st_size
                log, state = (log, state + size) if file.name == STATE else (log + size, state)
        return log, state

    # -- within a folder -----------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _expect(self, folder: Path, owner: Owner, expected: tuple[int, int]) -> None:
        found = self._owner(folder)
        if found is None:
            return  # missing or unreadable: this server's memory is the better source
        if found.deleted and expected == (found.epoch, found.generation):
            return  # created anew by one who has seen the tombstone
        if found.deleted or found.server != self.server or (found.epoch, found.generation) != expected:
            raise SessionConflict("another server has changed or deleted this session; send the request again")

    def _owner(self, folder: Path) -> Owner | None:
        try:
            return Owner(**json.loads((folder / "owner.json").read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            logger.warning("session folder %s: owner.json cannot be read: %s", folder.name, str(error))
            return None

    def _put_owner(self, folder: Path, owner: Owner, *, sync: bool = False) -> None:
        owner.changed = time.time()
        with _replacing(folder / "owner.json", sync=sync) as file:
            file.write(json.dumps(asdict(owner)).encode())

    def _put(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, str], *, sync: bool) -> None:
        if path.exists() and meta.get("keep_foreign") == "1":
            path.replace(path.with_suffix(".refused"))
        with _replacing(path, sync=sync) as file:
            snapshot.write(file, tensors, meta, self.secret, sums=True)

    def _log_generation(self, folder: Path) -> int:
        try:
            mapped = memoryview((folder / LOG).read_bytes())
            return int(snapshot._header(mapped)[2]["generation"])
        except (OSError, SnapshotRefused, KeyError, ValueError):
            return -1

    def _lives(self, server: str) -> bool:
        try:
            handle = os.open(self.directory / "servers" / server, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(handle)

    # -- the directory -------------------------------------------------------------------------------------

    def _secret(self) -> bytes:
        path = self.directory / "key"
        if not path.exists():
            draft = self.directory / f"key.{self.server}"
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
        """Remove marks of dead servers, half-written files nobody writes any more, and old tombstones."""
        for mark in (self.directory / "servers").iterdir():
            if mark.name != self.server and not self._lives(mark.name):
                mark.unlink(missing_ok=True)
        for folder in self.directory.iterdir():
            if folder.name in ("servers", "key") or not folder.is_dir():
                continue
            with self._locked(folder):
                for draft in folder.glob("*.draft"):
                    draft.unlink(missing_ok=True)
                owner = self._owner(folder)
                if owner is not None and owner.deleted and time.time() - owner.changed > _TOMBSTONE_DAYS * 86400:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reading_ahead(file: BinaryIO) -> Iterator[None]:
    """A thread that draws a file into the page cache, several times faster than page faults do."""
    left = threading.Event()

    def main() -> None:
        buffer, position = bytearray(_AHEAD), 0
        with suppress(OSError):  # whoever needs the data meets the error
            while not left.is_set() and (length := os.preadv(file.fileno(), [buffer], position)):
                position += length

    thread = threading.Thread(target=main, name="pacellm-read-ahead", daemon=True)
    if os.fstat(file.fileno()).st_size > 4 * _AHEAD:
        thread.start()
    try:
        yield
    finally:
        left.set()
        if thread.ident is not None:
            thread.join()


@contextmanager
def _replacing(path: Path, *, sync: bool) -> Iterator[BinaryIO]:
    """A draft that takes the place of ``path`` once it is whole; on failure nothing has changed."""
    draft = path.with_name(path.name + ".draft")
    try:
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if sync:
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
