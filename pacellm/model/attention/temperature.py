"""Llama 4's attention temperature: queries of layers without rotary positions grow with the logarithm of their
position. The model counts positions from the first row of a call, which in a packed step is another sequence's; so its
own scaling is put out of the way when the model is made ready, and the attention function does it with the step's
positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pacellm.model.context import StepContext


def take_over(model: nn.Module) -> None:
    """Move the scaling from the model's attention modules to :func:`tempered`."""
    for module in model.modules():
        each: Any = module
        if getattr(each, "attn_temperature_tuning", False):
            each.attn_temperature_tuning = False
            if not each.use_rope:
                each.pacellm_temperature = (float(each.attn_scale), float(each.floor_scale))


def tempered(module: nn.Module, step: StepContext, query: Tensor) -> Tensor:
    """[1, H, T, D] queries, scaled where their layer asks for it."""
    found: Any = getattr(module, "pacellm_temperature", None)
    if found is None:
        return query
    scale, floor = found
    scales = torch.log1p(torch.floor((_positions(step, query) + 1.0) / floor)) * scale + 1.0
    return (query * scales[:, None]).to(query.dtype)


def _positions(step: StepContext, query: Tensor) -> Tensor:
    """[T] float32 positions of the step's rows; 0 where a row is padding."""
    kept = step.scratch.get("positions")
    if not isinstance(kept, Tensor):
        kept = torch.zeros(query.shape[2])
        for chunk in step.chunks:
            count = chunk.stop - chunk.start
            kept[chunk.start : chunk.stop] = torch.arange(chunk.position, chunk.position + count)
        kept = step.scratch["positions"] = kept.to(query.device)
    return kept
