"""Which experts a session's decoded tokens use: GRIFFIN's choice from the prompt (arXiv 2404.01365), by whole experts.

The set is a function of the session's activity, the layout's heat and the density alone. Nothing waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOT = 8
"""One expert of so many is in every set: the layout's hottest, so that the sets of a batch share weights."""


def set_size(density: float, num_experts: int) -> int:
    """Experts of a set."""
    return max(1, round(density * num_experts))


def choose(activity: Tensor, heat: Tensor, density: float) -> Tensor:
    """[..., E] bool: the hot experts, then the most active ones; ties to the lower number.

    Args:
        activity: [..., E] int64, of one layer or of several.
        heat: [..., E] of the layout, where the activity is.
        density: part of the experts that is chosen.
    """
    num_experts = activity.shape[-1]
    size = set_size(density, num_experts)
    num_hot = min(size, max(1, num_experts // HOT))
    hottest = torch.argsort(heat, dim=-1, descending=True, stable=True)[..., :num_hot]
    chosen = torch.zeros_like(activity, dtype=torch.bool).scatter_(-1, hottest, True)
    order = torch.argsort(activity.masked_fill(chosen, -1), dim=-1, descending=True, stable=True)
    return chosen.scatter_(-1, order[..., : size - num_hot], True)


class SetTable:
    """The working sets of all bank rows, where kernels find them by row.

    A row holds whatever was written last; who works on it knows whether that is its own.

    Args:
        heat: [L, E] of the layout.
        num_rows: of banks. Two more follow: an empty set, for what pads a step, and one of all experts.
    """

    def __init__(self, heat: Tensor, num_rows: int, device: torch.device) -> None:
        self._heat = heat.to(device)
        self._sets = torch.zeros(len(heat), num_rows + 2, heat.shape[1], dtype=torch.bool, device=device)
        self._sets[:, -1] = True
        self.layers = list(self._sets)  # [rows, E] bool each, in place
        self.everything = num_rows + 1

    def write(self, row: int, activity: Tensor, density: float, layer: int) -> Tensor:
        """Choose a row's set of one layer from ``activity`` [L, E]; [E] bool in place."""
        self.layers[layer][row] = choose(activity[layer], self._heat[layer], density)
        return self.layers[layer][row]

    def write_all(self, row: int, activity: Tensor, density: float) -> dict[int, Tensor]:
        """The same in every layer, by layer."""
        self._sets[:, row] = choose(activity, self._heat, density)
        return dict(enumerate(self._sets[:, row]))
