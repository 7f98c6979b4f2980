"""GET /openapi.json."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from .document import document

router = APIRouter()


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, Any]:
    """This document."""
    app = request.app
    if app.openapi_schema is None:
        app.openapi_schema = document(app)
    return app.openapi_schema
