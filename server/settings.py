"""What the HTTP side is told at start-up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits of the HTTP surface.

    Attributes:
        model_name: the name that clients ask for.
        max_body_bytes: larger request bodies are refused with 413.
        body_seconds: seconds in which a body must have come, else 408.
        keep_alive_seconds: longest silence of a stream before a comment is sent.
        progress_seconds: how often a queued stream that asked for progress is told its place.
        heartbeat_limit: seconds without an engine heartbeat before /health fails.
        max_snapshot_bytes: larger session snapshots are neither made nor taken.
        allow_unsigned_snapshots: take session snapshots that another server signed, or nobody.
        header_wait: seconds that a stream's headers wait for admission, to say what it found.
        request_timeout: seconds from arrival to the end of an answer, None for no deadline.
        max_requests_per_key: requests that one tenant may have queued or running, None for no limit.
        max_connections: open at once; fewer where there are not descriptors enough.
        head_seconds: seconds in which a request's head must have come, also from the end of the answer before.
        stall_seconds: seconds that a client may take no byte of its answer.
        max_sessions_per_key: sessions that one tenant may have, None for no limit.
        allowed_hosts: names that the Host header may have beside IP addresses; empty lets everything pass.
        cors_origins: origins whose pages may use the server; empty: only its own.
        response_memory: bytes of stored responses and their conversations' messages.
        response_ttl: seconds that a stored response lives.
        admin_port: /metrics is served on this port instead of the main one.
        metrics_tenant: whose keys alone may read /metrics; None lets every key.
        share_snapshots: take session snapshots that were made of another tenant's sessions.
        page: serve / and /docs.
    """

    model_name: str
    max_body_bytes: int = 64 * 2**20
    body_seconds: float = 60.0
    keep_alive_seconds: float = 15.0
    progress_seconds: float = 1.0
    heartbeat_limit: float = 120.0
    header_wait: float = 1.0
    request_timeout: float | None = None
    max_requests_per_key: int | None = None
    max_connections: int = 1024
    head_seconds: float = 15.0
    stall_seconds: float = 60.0
    max_sessions_per_key: int | None = 100_000
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    admin_port: int | None = None
    metrics_tenant: str | None = None
    share_snapshots: bool = False
    page: bool = True
    max_snapshot_bytes: int = 2**30
    allow_unsigned_snapshots: bool = False
    response_memory: int = 256 * 2**20
    response_ttl: float = 30 * 86400.0
