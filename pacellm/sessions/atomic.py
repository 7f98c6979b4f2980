"""Files that take the place of others at once: written beside, synced where asked, renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeGuard


class Draft(NamedTuple):
    """A file to be: ``write`` gives its contents.

    Attributes:
        sync: it is on disk before it takes its place.
        keeps_former: what stands in its place is set aside, not replaced.
    """

    name: str
    write: Callable[[BinaryIO], object]
    sync: bool
    keeps_former: bool = False


class Unsettled(OSError):
    """It failed when some of it had taken its place: the change may be there all the same."""

    def __init__(self, error: OSError) -> None:
        why = error.strerror or type(error).__name__
        super().__init__(error.errno, f"{why}; the change may be there all the same", error.filename)


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """The disk had no room, or its quota is used up, and nothing has changed."""
    return (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, Unsettled)
    )


def publish(folder: Path, *drafts: Draft) -> None:
    """Write all drafts, then let them take their places in order.

    Raises:
        Unsettled: a draft could not take its place after others had, or the folder could not be synced.
        OSError: the disk is full, say; nothing has changed.
    """
    paths = [folder / f"{draft.name}.draft" for draft in drafts]
    try:
        for path, draft in zip(paths, drafts, strict=True):
            _write(path, draft)
        _place(folder, paths, drafts)
    except BaseException:
        for path in paths:
            with suppress(OSError):  # what stays is written over, or tidied away
                path.unlink(missing_ok=True)
        raise


def _write(path: Path, draft: Draft) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        draft.write(file)
        file.flush()
        if draft.sync:
            os.fsync(file.fileno())


def _place(folder: Path, paths: Sequence[Path], drafts: Sequence[Draft]) -> None:
    has_begun = False
    try:
        for path, draft in zip(paths, drafts, strict=True):
            if draft.keeps_former:
                set_aside(folder / draft.name)
            path.replace(folder / draft.name)
            has_begun = True
        if any(draft.sync for draft in drafts):
            sync_path(folder)
    except OSError as error:
        if has_begun:
            raise Unsettled(error) from error
        raise


def sync_path(path: Path) -> None:
    """A file's bytes, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path) -> None:
    """Keep a file that was refused, under a name of its own beside others of its kind; nothing where there is none."""
    target, number = path.with_suffix(".refused"), 0
    while target.exists():
        number += 1
        target = path.with_suffix(f".{number}.refused")
    if path.exists():
        path.rename(target)
