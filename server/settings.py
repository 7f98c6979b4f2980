"""What the HTTP side is told at start-up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits of the HTTP surface.

    Attributes:
        model_name: the name that clients ask for.
        max_body_bytes: larger request bodies are refused with 413.
        keep_alive_seconds: longest silence of a stream before a comment is sent.
        heartbeat_limit: seconds without an engine heartbeat before /health fails.
        max_snapshot_bytes: larger session snapshots are neither made nor taken.
        allow_unsigned_snapshots: take session snapshots that another server signed, or nobody.
        header_wait: seconds that a stream's headers wait for admission, to say what it found.
    """

    model_name: str
    max_body_bytes: int = 64 * 2**20
    keep_alive_seconds: float = 15.0
    heartbeat_limit: float = 120.0
    header_wait: float = 1.0
    max_snapshot_bytes: int = 2**30
    allow_unsigned_snapshots: bool = False
