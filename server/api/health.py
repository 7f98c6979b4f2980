"""Whether the server lives and is ready, and what it counts."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

import pacellm
from pacellm.errors import Forbidden

from ..auth import tenant_of
from ..service import Service

public = APIRouter()  # the only routes that need no key
router = APIRouter()
admin = APIRouter()


@public.get("/health")
async def health(request: Request) -> Response:
    """Alive: the engine loop beats."""
    service: Service = request.app.state.service
    age = time.monotonic() - service.thread.heartbeat
    alive = service.thread.is_alive and age < service.settings.heartbeat_limit
    status = {"status": "ok" if alive else "dead", "heartbeat_age_seconds": round(age, 3)}
    return JSONResponse(status, status_code=200 if alive else 503)


@public.get("/ready")
async def ready(request: Request) -> Response:
    """Ready: loaded, and not draining."""
    service: Service = request.app.state.service
    is_ready = service.thread.is_alive and not service.thread.is_draining
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, status_code=200 if is_ready else 503)


@router.get("/version")
async def version(request: Request) -> dict[str, Any]:
    """The server's version, what attends prompts on its device, how its linear layers are computed, and how banks take
    part where requests do not say."""
    service: Service = request.app.state.service
    engine, config = service.engine, service.engine.config
    return {
        "version": pacellm.__version__,
        "attention_kernel": "cpu" if engine.kernel is None else engine.kernel.name,
        "products": {"kernel": engine.products.kernel, "rows": engine.products.rows, "exact": engine.products.is_exact},
        "pa": config.bank.preset if config.pa else "off",
    }


@admin.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service: Service = request.app.state.service
    reader = service.settings.metrics_tenant
    if reader is not None and tenant_of(request) != reader:
        raise Forbidden("only keys of the tenant that --metrics-tenant names may read metrics")
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
