"""A file system that fails and a process that dies, at any call that changes the session directory."""

import errno
import io
import os

CALLS = ("open", "write", "fsync", "sync folder", "replace", "rename", "unlink", "mkdir")


class Killed(Exception):
    """The process is no more: it changes nothing from here on."""


class FailingDisk:
    """Calls of ``os`` that change something under a directory, of which some fail.

    Args:
        directory: of the sessions; other files are left alone.

    Attributes:
        is_dead: the process has died.
        failed: (call, name of the file) that failed since :meth:`begin`.
    """

    def __init__(self, directory):
        self.directory = os.path.realpath(directory)
        self._files = {}
        self.calm()

    def begin(self, fails, dies, error=errno.EIO):
        """From here on calls fail where they are the ``fails``th, or of that name, or (of that name, on that file);
        ``full`` are those that take room. Where one is what ``dies`` says so, the process does.

        Args:
            error: number that calls fail with.
        """
        self._fails, self._dies, self._error = fails, dies, error
        self._count, self.is_dead, self.failed = 0, False, []

    def calm(self):
        """Nothing fails."""
        self.begin(None, None)

    def install(self, monkeypatch):
        """Put it in the place of ``os``'s calls."""
        self._real = {name: getattr(os, name) for name in ("open", "fdopen", "replace", "rename", "unlink", "mkdir")}
        for name in ("replace", "rename", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._path_call(name))
        monkeypatch.setattr(os, "open", self._open)
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "fdopen", self._fdopen)

    def meet(self, call, path, *, takes_room):
        """One call: nothing, an error or the end."""
        number, self._count, name = self._count, self._count + 1, os.path.basename(path)
        here = number, call, (call, name)
        self.is_dead = self.is_dead or self._dies in here
        if self.is_dead:
            raise Killed
        is_full = self._fails == "full" and takes_room
        if is_full or self._fails in here:
            error = errno.ENOSPC if is_full else self._error
            self.failed.append((call, name))
            raise OSError(error, os.strerror(error), str(path))

    def _is_here(self, path):
        return isinstance(path, str | os.PathLike) and os.path.realpath(path).startswith(self.directory)

    def _path_call(self, name):
        def call(path, *arguments, **options):
            if self._is_here(path):
                self.meet(name, path, takes_room=name == "mkdir")
            return self._real[name](path, *arguments, **options)

        return call

    def _open(self, path, flags, *arguments, **options):
        is_here = self._is_here(path)
        if is_here and flags & os.O_CREAT:
            self.meet("open", path, takes_room=not os.path.exists(path))
        handle = self._real["open"](path, flags, *arguments, **options)
        if is_here:
            self._files[handle] = str(path)
        else:
            self._files.pop(handle, None)
        return handle

    def _fsync(self, handle):
        if handle in self._files:
            path = self._files[handle]
            self.meet("sync folder" if os.path.isdir(path) else "fsync", path, takes_room=False)
        # nothing here outlives the machine

    def _fdopen(self, handle, mode="r", *arguments, **options):
        if handle not in self._files or mode != "wb":
            return self._real["fdopen"](handle, mode, *arguments, **options)
        return io.BufferedWriter(_Raw(self, handle, self._files[handle]))


class _Raw(io.FileIO):
    def __init__(self, disk, handle, path):
        super().__init__(handle, "wb")
        self._disk, self._path = disk, path

    def write(self, data):
        data = memoryview(data)
        try:
            self._disk.meet("write", self._path, takes_room=True)
        except BaseException:
            super().write(data[: len(data) // 2])
            raise
        return super().write(data)
