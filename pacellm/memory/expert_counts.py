"""Expert activity: what a session's prompts have made each FFN expert do. Kept in the same rows as its banks.

A token counts for ``UNIT`` in every layer, shared among experts by their part of its squared activations. Counts are
integers, so that sums do not depend on how a prompt is cut into steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXPERTS = -1
"""The activity's place among a row's banks, which are numbered by layer."""
UNIT = 2**20


class ActivityState(NamedTuple):
    """Activity of one session, or what an incomplete segment will add to it: [L, E] int64."""

    activity: Tensor

    def clear(self) -> None:
        """Forget everything."""
        self.activity.zero_()

    def copy_(self, other: ActivityState) -> None:
        """Overwrite with ``other``'s."""
        self.activity.copy_(other.activity)


def count(inner: Tensor, num_experts: int) -> Tensor:
    """[E] int64: what tokens [n, F] add to a layer's activity; neurons of an expert lie side by side."""
    squares = inner.float().square().view(len(inner), num_experts, -1).sum(2)
    shares = squares / squares.sum(1, keepdim=True).clamp(min=1e-30)
    return (torch.nan_to_num(shares, 0.0, 0.0, 0.0) * UNIT).round().long().sum(0)
