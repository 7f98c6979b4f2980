"""Session directories that take nothing, as a full disk or a read-only file system."""

import errno
import os

from pacellm.sessions import atomic as publish
from pacellm.sessions import folder

KINDS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "not ours": errno.EACCES}


def break_disk(monkeypatch, kind):
    """From here on nothing is written; names of files are in the errors, as the system puts them there."""
    number = KINDS[kind]

    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(folder, "publish", refuse)
    if kind != "full":
        for name in ("unlink", "rename", "replace", "mkdir"):
            monkeypatch.setattr(publish.Path, name, refuse)
