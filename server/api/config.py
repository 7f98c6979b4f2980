"""GET /v1/config."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request

import pacellm

from ..service import Service

router = APIRouter()
_NOT_TOLD = frozenset(("allowed_hosts", "cors_origins", "admin_port", "metrics_tenant"))  # who may come, and from where


@router.get("/v1/config")
async def config(request: Request) -> dict[str, Any]:
    """What the server runs with: the model, the engine's config as it was resolved, limits of the HTTP side. No keys,
    hosts, tenants or paths."""
    service: Service = request.app.state.service
    engine, model = service.engine, service.engine.model
    told = dataclasses.asdict(engine.config)
    directory = told.pop("session_dir")
    settings = dataclasses.asdict(service.settings)
    return {
        "object": "config",
        "version": pacellm.__version__,
        "model": {
            "id": service.settings.model_name,
            "layers": model.num_layers,
            "context_length": model.context_length,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "kv_bytes_per_token": model.bytes_per_token,
            "chat_template": service.tokenizer.has_chat_template,
        },
        "engine": {**told, "keeps_sessions_on_disk": directory is not None},
        "server": {name: value for name, value in settings.items() if name not in _NOT_TOLD},
    }
