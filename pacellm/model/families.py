"""How each architecture's FFN is laid out, and which architectures are served."""

from __future__ import annotations

from typing import Literal

from torch import nn

from pacellm.errors import ModelError

Layout = Literal["gate_up_down", "fused_gate_up"]

# Dense decoders with full or sliding-window attention whose gated FFN is one of two layouts. Others are refused
# when they are loaded: a wrong guess would be silent.
FAMILIES: dict[str, Layout] = {
    "llama": "gate_up_down",
    "mistral": "gate_up_down",
    "ministral": "gate_up_down",
    "qwen2": "gate_up_down",
    "qwen3": "gate_up_down",
    "smollm3": "gate_up_down",
    "granite": "gate_up_down",
    "olmo2": "gate_up_down",
    "phi3": "fused_gate_up",
}


def family_of(model_type: str) -> Layout:
    """The FFN layout of an architecture.

    Raises:
        ModelError: an architecture that is not served.
    """
    if model_type not in FAMILIES:
        raise ModelError(f"model type {model_type!r} is not served; these are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def ffn_sizes(mlp: nn.Module, layout: Layout) -> tuple[int, int]:
    """(inner size F, hidden size H) of a gated FFN, from its projections.

    Raises:
        ModelError: the module does not look like its family.
    """
    wanted = ("gate_up_proj", "down_proj") if layout == "fused_gate_up" else ("gate_proj", "up_proj", "down_proj")
    missing = [name for name in wanted if not hasattr(mlp, name)]
    if missing:
        raise ModelError(f"{type(mlp).__name__} has no {', '.join(missing)}; its FFN cannot be patched")
    down = mlp.down_proj
    return int(down.in_features), int(down.out_features)  # type: ignore[union-attr,arg-type]


def activation_of(mlp: nn.Module) -> nn.Module:
    """The FFN's activation, under either of its two names.

    Raises:
        ModelError: there is none.
    """
    for name in ("act_fn", "activation_fn"):
        if hasattr(mlp, name):
            return getattr(mlp, name)
    raise ModelError(f"{type(mlp).__name__} has no act_fn; its FFN cannot be patched")
