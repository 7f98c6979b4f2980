"""What moves of sessions came to. Plain numbers, written by the engine thread and read by whoever scrapes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger("pacellm.sessions")


@dataclass
class MoverStats:
    """Totals since the start: moves, their bytes and seconds, and what was refused."""

    spills: int = 0
    restores: int = 0
    spilled_bytes: int = 0
    restored_bytes: int = 0
    spill_seconds: float = 0.0
    restore_seconds: float = 0.0
    failures: int = 0
    refused: int = 0

    def count_spill(self, nbytes: int, seconds: float) -> None:
        """A session went a tier down."""
        self.spills += 1
        self.spilled_bytes += nbytes
        self.spill_seconds += seconds

    def say_failure(self, key: tuple[str, str], what: str, error: BaseException) -> None:
        """A move failed; the session stays where it was, or only its log does."""
        self.failures += 1
        logger.warning("session %r of tenant %r: %s failed: %s", key[1], key[0], what, str(error))
