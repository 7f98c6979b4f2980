"""What a long measurement says while it runs."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line about what is being measured and how long the rest will take, on stderr."""

    def __init__(self) -> None:
        self._total = self._done = 0.0
        self._name = ""
        self._started = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def expect(self, work: float) -> None:
        """There is so much more to do."""
        self._total += work

    def begin(self, name: str) -> None:
        """What follows is about ``name``."""
        self._name = name
        self._show()

    def add(self, work: float) -> None:
        """So much of it was done."""
        self._done += work
        if self._is_terminal and time.monotonic() - self._shown > 0.5:
            self._show()

    def end(self) -> None:
        """Everything was."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        self._shown = now = time.monotonic()
        line = self._name
        if self._done > 0:
            left = max(0.0, (now - self._started) / self._done * (self._total - self._done))
            line += f", {int(left) // 60}:{int(left) % 60:02d} left"
        print(f"\r\033[K{line}" if self._is_terminal else line, end="" if self._is_terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
