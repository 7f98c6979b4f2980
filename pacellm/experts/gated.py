"""A gated FFN as kernels take it: its parameters, and its activation by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Weights(NamedTuple):
    """A gated FFN's parameters: gate and up [F, H], down [H, F], biases [F], [F], [H] where there are any."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """``silu``, ``gelu`` or ``gelu_tanh``, by what it does to numbers; None for another one."""
    x = torch.linspace(-6, 6, 97)
    try:
        found = activation(x)
    except (RuntimeError, TypeError):
        return None
    return next((name for name, form in ACTIVATIONS.items() if torch.allclose(found, form(x), atol=1e-5)), None)
