"""Requests that run or wait: a list, and cancelling from another connection."""

from __future__ import annotations

import re
import time
from typing import Any

from fastapi import APIRouter, Request

from pacellm.errors import NotFound

from ..auth import lister_of, tenant_of
from ..edge import REQUEST_ID
from ..generation import Generation
from ..service import Service

router = APIRouter()


@router.get("/v1/requests")
async def list_requests(request: Request) -> dict[str, Any]:
    """The caller's requests that run or wait, no content of theirs, and what the whole server is at. Without API keys
    they are told to this machine alone."""
    service: Service = request.app.state.service
    data = [_shown(service, one) for one in service.going(lister_of(request))]
    reader = service.settings.metrics_tenant
    told = reader is None or tenant_of(request) == reader
    return {"object": "list", "data": data, "server": _load(service) if told else None}


@router.post("/v1/requests/{request_id}/cancel")
async def cancel(request: Request, request_id: str) -> dict[str, Any]:
    """Cancel the caller's own requests that carried this X-Request-ID or whose answer has this id."""
    service: Service = request.app.state.service
    count = service.cancel_all(tenant_of(request), request_id) if re.match(REQUEST_ID, request_id) else 0
    if not count:
        raise NotFound("no such request is queued or running", param="request_id")
    return {"id": request_id, "object": "request.cancelled", "cancelled": count}


def _shown(service: Service, one: Generation) -> dict[str, Any]:
    request, progress = one.request, one.progress
    status = "queued" if progress is None else "generating" if one.num_generated else "reading"
    return {
        "id": request.request_id,
        "object": "request",
        "request_id": one.caller.request_id,
        "session_id": None if request.session is None else request.session[1],
        "status": status,
        "age_ms": round(1000 * (time.monotonic() - request.arrival)),
        "priority": request.priority,
        "prompt_tokens": len(request.prompt),
        "to_read": 0 if progress is None else progress.total,
        "read": 0 if progress is None else progress.processed,
        "generated": one.num_generated,
        "queue": service.place(one) if progress is None else None,
    }


def _load(service: Service) -> dict[str, Any]:
    """Requests and memory of all callers together, in numbers; a limit that is not there is null."""
    engine, thread, pool = service.engine, service.thread, service.engine.pool
    store, host, files = engine.sessions, engine.mover.host, engine.mover.files
    blocks = engine.num_blocks - engine.allocator.num_free
    return {
        "running": thread.num_running,
        "queued": thread.num_queued,
        "max_running": engine.config.max_num_seqs,
        "max_queued": engine.config.max_waiting,
        "sessions": dict(store.usage.tiers),
        "memory": {
            "device": {"used": blocks * engine.block_bytes, "size": engine.num_blocks * engine.block_bytes},
            "banks": {"used": store.bank_bytes, "size": 0 if pool is None else pool.bytes_per_row * pool.num_rows},
            "host": {"used": host.bytes, "size": host.capacity},
            "disk": {
                "used": 0 if files is None else files.usage.bytes,
                "size": 0 if files is None else files.budget.limit,
            },
        },
    }
