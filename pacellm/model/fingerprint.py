"""Which model this is, in any number format: cheap enough to ask at every start."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 1024


def model_sample(module: nn.Module) -> str:
    """64 hex digits of every parameter's shape and of up to ``_SAMPLES`` of its numbers, evenly spread and as bfloat16,
    with the model's type and rotary positions. Fine-tuning changes it, --dtype does not.

    Args:
        module: its neurons in the order they came in; split over processes it is told by this one's part.
    """
    config: Any = module.config
    facts = {"type": config.model_type, "rope": getattr(config, "rope_parameters", None)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weight in module.named_parameters():
        digest.update(f"{name.replace('.original.', '.')} {list(weight.shape)}".encode())
        numbers: Any = _sample(weight.detach()).to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        digest.update(numbers.tobytes())
    return digest.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    """[n] numbers in the order of their indices, wherever they lie in memory."""
    if hasattr(weight, "to_local"):  # a DTensor
        weight = weight.to_local()
    if type(weight) is not Tensor and weight.is_floating_point():  # quantised, by a class of its own
        weight = weight.dequantize()
    count = min(_SAMPLES, weight.numel())
    flat = torch.arange(count, device=weight.device) * weight.numel() // max(1, count)
    places = torch.unravel_index(flat, weight.shape)
    return weight[places].reshape(-1)
