"""The FastAPI app around a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import pacellm

from . import errors
from .api import routers
from .auth import Keys
from .edge import Edge
from .page import route as page
from .service import Service

_EXPOSED = ("X-Request-ID", "X-PaceLLM-Session", "X-PaceLLM-Dropped-Tokens", "Retry-After", "x-should-retry")


def create_app(service: Service, keys: Keys | None = None) -> ASGIApp:
    """An app that starts the service's engine when it starts, and ends it when it ends.

    Args:
        keys: who may use it; None lets everybody in as one tenant.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    settings = service.settings
    app = _new_app(service, keys, lifespan)
    app.include_router(routers.public)
    app.include_router(routers.private)
    if settings.page:
        app.include_router(page.router)
    if settings.admin_port is None:
        app.include_router(routers.admin)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    return Edge(app, settings.allowed_hosts, settings.cors_origins, service.metrics.count_response)


def create_admin_app(service: Service, keys: Keys | None = None) -> ASGIApp:
    """What is served on the admin port: metrics and health. The main app owns the engine."""
    app = _new_app(service, keys, None)
    app.include_router(routers.public)
    app.include_router(routers.admin)
    return Edge(app, service.settings.allowed_hosts, service.settings.cors_origins)


def _new_app(service: Service, keys: Keys | None, lifespan) -> FastAPI:
    app = FastAPI(
        title="PaceLLM", version=pacellm.__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.service, app.state.keys = service, keys or Keys({})
    errors.install(app)
    return app
