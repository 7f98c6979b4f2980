"""What own kernels need."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def has_triton(device: torch.device) -> bool:
    """Kernels written in Triton run on this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
