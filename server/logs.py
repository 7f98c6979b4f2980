"""Logging: lines for people, or one JSON object a line. Nothing of a request's content is ever logged.

Loggers are ``pacellm`` and ``pacellm.`` with a package of ours, or with ``access`` for the line that each request has.
Lines of other packages go under these names too, with their own in the field ``library``.
"""

from __future__ import annotations

import contextvars
import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PER_REQUEST = "pacellm.access"  # its lines are the record of what was answered
_NAMES = {"uvicorn": "pacellm.server", "asyncio": "pacellm.server", "transformers": "pacellm.model",
          "torch": "pacellm.model", "py": "pacellm.warnings"}  # fmt: skip
_WITH_HANDLERS = ("transformers", "huggingface_hub")
logger = logging.getLogger("pacellm")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        shown: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)
        return json.dumps(shown, ensure_ascii=False, default=str)


class CountingHandler(logging.StreamHandler):
    """Writes lines of one kind a few times within a while; of more of them, how many there were.

    Lines are of one kind where logger and message, before what is put into it, are the same.

    Args:
        most: lines of a kind that are written within ``seconds``.
    """

    def __init__(self, stream: Any = None, *, most: int = 10, seconds: float = 10.0) -> None:
        super().__init__(stream)
        self._most, self._seconds = most, seconds
        self._seen: dict[tuple[str, str], tuple[float, int, int]] = {}  # by kind: since when, how many, level
        self._next_look = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line or count it. Called with the handler's lock held."""
        now = time.monotonic()
        if now >= self._next_look:
            self._report(now)
        if record.name == _PER_REQUEST:
            super().emit(record)
            return
        kind = record.name, str(record.msg)[:200]
        since, count, _ = self._seen.get(kind, (now, 0, 0))
        self._seen[kind] = since, count + 1, record.levelno
        if count < self._most:
            super().emit(record)

    def close(self) -> None:
        """Say what was counted."""
        self._report(float("inf"))
        super().close()

    def _report(self, now: float) -> None:
        self._next_look = now + 1.0
        for kind, (since, count, level) in list(self._seen.items()):
            if now - since < self._seconds:
                continue
            del self._seen[kind]
            if count > self._most:
                name, message = kind
                told = f"{count - self._most:,} more lines like {message!r} within {self._seconds:g} s"
                super().emit(logging.LogRecord(name, level, "", 0, told, None, None))


class Lines(io.TextIOBase):
    """Stands where standard output or error was, and logs each line that others write there: progress bars, prints.

    Args:
        name: of the logger.
        level: of the lines.
        stream: what it stands for, and what children of this process still write to.
    """

    def __init__(self, name: str, level: int, stream: TextIO) -> None:
        self._logger, self._level, self.stream = logging.getLogger(name), level, stream
        self._lock, self._begun = threading.RLock(), ""
        self._within = threading.local()  # what a handler that fails prints here would fail there again

    def write(self, text: str) -> int:
        """Log what has become whole lines; a carriage return ends one too."""
        with self._lock:
            *lines, self._begun = (self._begun + text).replace("\r", "\n").split("\n")
        self._log(*lines)
        return len(text)

    def flush(self) -> None:
        """Log what has no end yet."""
        with self._lock:
            line, self._begun = self._begun, ""
        self._log(line)

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """Of what it stands for."""
        return self.stream.fileno()

    def _log(self, *lines: str) -> None:
        if getattr(self._within, "logging", False):
            return
        self._within.logging = True
        try:
            for line in filter(str.strip, lines):
                self._logger.log(self._level, line)  # without arguments a line is taken as it is
        finally:
            self._within.logging = False


def configure(level: str, form: LogFormat) -> None:
    """Set up the root logger; everything, uvicorn's and warnings too, goes through it to standard error. As JSON so do
    whatever this process writes to its standard output and error, and exceptions that nobody caught."""
    output, errors = (each.stream if isinstance(each, Lines) else each for each in (sys.stdout, sys.stderr))
    handler = CountingHandler(errors)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    handler.addFilter(with_our_name)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    if form == "json":
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
        sys.stdout = Lines("pacellm.stdout", logging.INFO, output)
        sys.stderr = Lines("pacellm.stderr", logging.WARNING, errors)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda thread: _log_uncaught(thread.exc_type, thread.exc_value, thread.exc_traceback)


def adopt(names: Iterable[str] = _WITH_HANDLERS) -> None:
    """Packages that have set up a logger of their own when they were imported write through ours."""
    for name in names:
        own = logging.getLogger(name)
        own.handlers.clear()
        own.propagate = True


def with_our_name(record: logging.LogRecord) -> bool:
    """A filter that lets all through."""
    package = record.name.partition(".")[0]
    if package != "pacellm":
        record.fields = {**getattr(record, "fields", {}), "library": record.name}
        record.name = _NAMES.get(package, "pacellm.libraries")
    return True


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
    logger.critical("nobody caught this: %s", kind.__name__, exc_info=(kind, error or kind(), trace))
