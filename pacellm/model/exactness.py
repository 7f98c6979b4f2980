"""Whether a row of this machine's matrix products depends on how many rows stand beside it."""

from __future__ import annotations

import torch
from torch import nn

from pacellm.rows import ROWS

_MANY = 512


def inexact_products(module: nn.Module) -> list[tuple[int, int]]:
    """Sizes (in, out) of the linear layers whose rows have other bits among many rows than among ``ROWS``.

    Where there are any, answers can depend on batch mates and chunk sizes in the last bits of their logits. One
    layer of each size is measured, on CPU only: CUDA makes no such promise.
    """
    found: dict[tuple[int, int], bool] = {}
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu":
            size = (layer.in_features, layer.out_features)
            if size not in found:
                found[size] = _differs(layer)
    return sorted(size for size, differs in found.items() if differs)


def _differs(layer: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_MANY, layer.in_features, generator=generator).to(layer.weight.dtype)
    with torch.inference_mode():
        many = layer(rows)
        few = torch.cat([layer(part) for part in rows.split(ROWS)[:4]])
    return not torch.equal(few, many[: len(few)])
