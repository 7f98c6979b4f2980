"""Linear layers whose rows do not depend on how many others there are: for ``--deterministic`` on a GPU.

Libraries choose a kernel, and with it an order of sums, by the number of rows. Here every product has ``TILE`` rows,
the last ones padded, so a row has the same bits in a prompt's chunk, in a decode step and in a replay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE = 128


def fix_rows(module: nn.Module) -> None:
    """Change the forward of every linear layer; once is enough, twice does no harm."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and "forward" not in layer.__dict__:
            layer.forward = _Tiled(layer)  # type: ignore[method-assign,assignment]


class _Tiled:
    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        count = rows.shape[0]
        rows = F.pad(rows, (0, 0, 0, -count % TILE))
        output = rows.new_empty(rows.shape[0], self._layer.weight.shape[0])
        for start in range(0, rows.shape[0], TILE):
            tile = slice(start, start + TILE)
            torch.mm(rows[tile], self._layer.weight.T, out=output[tile])
        if self._layer.bias is not None:
            output += self._layer.bias
        return output[:count].reshape(*hidden.shape[:-1], -1)
