"""One session's folder: its files, its lock, and who owns it. Functions that block on the disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from pacellm.errors import SnapshotRefused
from pacellm.sessions import format as snapshot
from pacellm.sessions.atomic import Draft, publish
from pacellm.sessions.history_files import is_block
from pacellm.sessions.owner import MAX_BYTES, Owner, OwnerRefused, parse_owner, read_owner
from pacellm.sessions.session import Key

LOG, STATE, OWNER, _LOCK = "log.safetensors", "state.safetensors", "owner.json", "lock"
Files = dict[str, dict[str, Tensor]]


class Sizes(NamedTuple):
    """Bytes of one session's files.

    Attributes:
        log: and of what else is kept of it.
        state: with the blocks of its history.
        blocks: of these each, by name; forks' folders may have links to the same.
    """

    log: int = 0
    state: int = 0
    blocks: Mapping[str, int] = MappingProxyType({})

    @property
    def all(self) -> int:
        """Bytes of all files."""
        return self.log + self.state


@dataclass
class Claim:
    """What a session's folder says of it.

    Attributes:
        owner: None where there was never such a session, or nothing is left that tells of it.
        note: what was refused on the way.
    """

    owner: Owner | None
    note: str | None = None


def name_of(key: Key, secret: bytes) -> str:
    """A folder's name, which tells nothing."""
    return hmac.new(secret, "\0".join(key).encode(), hashlib.sha256).hexdigest()[:40]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this server alone."""
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = open_lock(folder / _LOCK, os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def open_lock(path: Path, flags: int = 0) -> int:
    """A file to be locked. Network file systems want it open for writing; one that is read only has no such need."""
    try:
        return os.open(path, flags | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return os.open(path, os.O_RDONLY)


def put(
    folder: Path,
    secret: bytes,
    owner: Owner,
    files: Files | None = None,
    meta: dict[str, str] | None = None,
    *,
    sync: bool,
    sync_states: bool = False,
) -> None:
    """Write files, then ``owner.json``: all of them or none. Logs are always synced.

    Args:
        files: tensors by name, all with the metadata ``meta``.
        sync: ``owner.json`` too.

    Raises:
        OSError: the disk is full, say; nothing has changed.
    """
    owner.changed = time.time()
    told, data = {**(meta or {}), "owner": owner.to_json()}, owner.to_bytes(secret)
    keeps, drafts = told.get("keep_foreign") == "1", []
    for name, tensors in (files or {}).items():
        write = partial(snapshot.write, tensors=tensors, metadata=told, secret=secret, sums=True)
        drafts.append(Draft(name, write, sync=sync_states or name == LOG, keeps_former=keeps))
    publish(folder, *drafts, Draft(OWNER, lambda file: file.write(data), sync=sync))


def sizes_of(folder: Path) -> Sizes:
    """What lies in a folder; nothing where there is none."""
    log = state = 0
    blocks = {}
    with suppress(FileNotFoundError), os.scandir(folder) as files:
        for file in files:
            size = file.stat().st_size
            if is_block(file.name):
                blocks[file.name] = size
            elif file.name == STATE:
                state += size
            else:
                log += size
    return Sizes(log, state + sum(blocks.values()), blocks)


def remove_files(folder: Path) -> None:
    """All but the owner and the lock."""
    for path in folder.iterdir():
        if path.name not in (_LOCK, OWNER):
            path.unlink()


def known(folder: Path, secret: bytes) -> Claim:
    """What ``owner.json`` says, or the log where that is damaged or missing.

    Raises:
        OSError: it cannot be read.
    """
    try:
        owner = owner_of(folder, secret)
        if owner is not None or not (folder / LOG).exists():
            if owner is not None and not (folder / STATE).exists():
                owner.about.stored = None  # it has given way
            return Claim(owner)
        refused = f"{OWNER} is missing"
    except OwnerRefused as error:
        refused = f"{OWNER} was refused: {error}"
    owner = _told_by_log(folder, secret)
    if owner is None:
        return Claim(None, refused)
    return Claim(owner, f"{refused}; the session is as its log has it, and later commits are not known")


def owner_of(folder: Path, secret: bytes) -> Owner | None:
    """None where there is no ``owner.json``.

    Raises:
        OwnerRefused: damaged. OSError: it cannot be read.
    """
    try:
        with (folder / OWNER).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_BYTES:
        raise OwnerRefused(f"more than {MAX_BYTES:,} bytes")
    return _of(folder, read_owner(data, secret), secret)


def _of(folder: Path, owner: Owner, secret: bytes) -> Owner:
    if name_of((owner.tenant, owner.id), secret) != folder.name:
        raise OwnerRefused("it is another session's, or of another key")
    return owner


def _told_by_log(folder: Path, secret: bytes) -> Owner | None:
    """The owner as it was when the log was written; the log's tensors are not read."""
    try:
        owner = _of(folder, parse_owner(_metadata(folder / LOG).get("owner", "")), secret)
    except OwnerRefused:
        return None
    owner.about.saved, owner.about.stored = owner.generation, _told_by_state(folder, owner.generation)
    return owner


def _told_by_state(folder: Path, generation: int) -> int | None:
    """Tokens of a state of this generation; None where there is none."""
    metadata = _metadata(folder / STATE)
    if metadata.get("generation") != str(generation):
        return None
    try:
        return parse_owner(metadata.get("owner", "")).about.stored
    except OwnerRefused:
        return None


def log_generation(folder: Path) -> int:
    """That of the log; -1 without one. From its header alone, which is not verified."""
    try:
        return int(_metadata(folder / LOG)["generation"])
    except (KeyError, ValueError):
        return -1


def _metadata(path: Path) -> dict[str, str]:
    """A file's, from its header alone; {} where there is none."""
    try:
        with path.open("rb") as file:
            return snapshot.metadata_of(file)
    except (FileNotFoundError, SnapshotRefused):
        return {}
