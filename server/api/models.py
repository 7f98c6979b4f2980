"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from pacellm.errors import ModelNotFound

from ..service import Service

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models served: one."""
    return {"object": "list", "data": [model_card(request.app.state.service)]}


@router.get("/v1/models/{model:path}")
async def one_model(request: Request, model: str) -> dict[str, Any]:
    """One model."""
    service: Service = request.app.state.service
    if model != service.settings.model_name:
        raise ModelNotFound(f"model {model!r} is not served here", param="model")
    return model_card(service)


def model_card(service: Service) -> dict[str, Any]:
    """A model as OpenAI lists it, with its context length under both usual names."""
    length = service.engine.config.max_model_len
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "pacellm",
        "max_model_len": length,
        "context_length": length,
    }
