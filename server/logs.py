"""Logging: lines for people, or one JSON object a line. Nothing of a request's content is ever logged."""

from __future__ import annotations

import contextvars
import json
import logging
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]
request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PER_REQUEST = "pacellm.access"  # its lines are the record of what was answered


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


def configure(level: str, form: LogFormat) -> None:
    """Set up the root logger; everything, uvicorn's too, goes through it to standard error."""
    handler = CountingHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
