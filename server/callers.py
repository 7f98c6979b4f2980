"""Who asks, as the rest of the server needs to know it."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from .auth import tenant_of


@dataclass(frozen=True)
class Caller:
    """Who asks, under which name, and until when.

    Attributes:
        tenant: namespace of the sessions.
        request_id: the X-Request-ID.
        arrival: monotonic seconds.
        size: bytes of the request's body.
        timeout: what the request allows itself, in seconds from arrival.
        traceparent: the span that the request belongs to, as its header names it.
    """

    tenant: str
    request_id: str
    arrival: float
    size: int = 0
    timeout: float | None = None
    traceparent: str | None = None

    @classmethod
    def of(cls, request: Request, size: int, timeout: float | None = None) -> Caller:
        """The caller of an HTTP request that was let in."""
        parent = request.headers.get("traceparent")
        return cls(tenant_of(request), request.state.request_id, request.state.arrival, size, timeout, parent)
