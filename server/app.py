"""The FastAPI app around a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import pacellm
from server import errors
from server.routes import router
from server.service import Service
from server.session_routes import router as session_router


def create_app(service: Service) -> FastAPI:
    """An app that starts the service's engine when it starts, and ends it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="PaceLLM", version=pacellm.__version__, lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    app.include_router(session_router)
    errors.install(app)
    return app
