"""Which experts a session's decoded tokens use: GRIFFIN's choice from the prompt (arXiv 2404.01365), by whole experts.

The set is a function of the session's activity, the layout's heat and the density alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacellm.experts.layout import hot_experts

HOT = 8
"""One expert of so many is in every set: the layout's hottest, so that the sets of a batch share weights."""


def set_size(density: float, num_experts: int) -> int:
    """Experts of a set."""
    return max(1, round(density * num_experts))


def choose(activity: Tensor, heat: Tensor, density: float) -> Tensor:
    """[E] bool: the hot experts, then the most active ones; ties to the lower number.

    Args:
        activity: [E] int64 of one layer.
        heat: [E] of the layout.
        density: part of the experts that is chosen.
    """
    num_experts = len(activity)
    size = set_size(density, num_experts)
    chosen = torch.zeros(num_experts, dtype=torch.bool)
    chosen[hot_experts(heat, min(size, max(1, num_experts // HOT)))] = True
    left = activity.cpu().masked_fill(chosen, -1)
    order = torch.argsort(left, descending=True, stable=True)
    chosen[order[: size - int(chosen.sum())]] = True
    return chosen
