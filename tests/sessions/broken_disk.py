"""Session directories that take nothing, as a full disk or a read-only file system, and what they are asked to take."""

import errno
import os

from pacellm.sessions import atomic, folder
from pacellm.sessions import format as snapshot
from tests.engine.helpers import banks, new_engine, prompt, request, run, tokens

KEY = ("tenant", "s")
FIRST, MORE = prompt(300, 1), prompt(60, 2)
KINDS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "not ours": errno.EACCES}


def break_disk(monkeypatch, kind):
    """From here on nothing is written; names of files are in the errors, as the system puts them there."""
    number = KINDS[kind]

    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(folder, "publish", refuse)
    if kind != "full":
        for name in ("unlink", "rename", "replace", "mkdir"):
            monkeypatch.setattr(atomic.Path, name, refuse)


def full_disk(monkeypatch, after=0):
    """The disk is full when ``after`` more files were written."""
    written = 0
    original = snapshot.write

    def write(file, *arguments, **options):
        nonlocal written
        written += 1
        if written > after:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, *arguments, **options)

    monkeypatch.setattr(snapshot, "write", write)


def second_turn(model):
    """(the second prompt of session ``s``, its answer, the banks after it), where nothing fails."""
    engine = new_engine(model)
    history = FIRST + tokens(run(engine, request("1", FIRST, session="s"))["1"]) + MORE
    answer = tokens(run(engine, request("2", history, session="s"))["2"])
    return history, answer, banks(engine, "s")
