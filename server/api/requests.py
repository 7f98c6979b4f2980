"""Cancelling a request from another connection."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request

from pacellm.errors import NotFound

from ..auth import tenant_of
from ..edge import REQUEST_ID
from ..service import Service

router = APIRouter()


@router.post("/v1/requests/{request_id}/cancel")
async def cancel(request: Request, request_id: str) -> dict[str, Any]:
    """Cancel the caller's own requests that carried this X-Request-ID or whose answer has this id."""
    service: Service = request.app.state.service
    count = service.cancel_all(tenant_of(request), request_id) if re.match(REQUEST_ID, request_id) else 0
    if not count:
        raise NotFound("no such request is queued or running", param="request_id")
    return {"id": request_id, "object": "request.cancelled", "cancelled": count}
