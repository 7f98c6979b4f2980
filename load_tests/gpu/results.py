"""Results as JSON lines, written at once: a crash or the clock loses nothing that was measured."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Results:
    """The results of one part.

    Args:
        path: the file that lines are added to.
        part: named in each line.
    """

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part, self._started = path, part, time.perf_counter()

    def add(self, name: str, **cells: Any) -> None:
        """One line; ``at`` is seconds since the part began."""
        line = {"part": self._part, "name": name, "at": round(time.perf_counter() - self._started, 2), **cells}
        text = json.dumps(line)
        with self._path.open("a") as file:
            file.write(text + "\n")
        print(text[:600], flush=True)
