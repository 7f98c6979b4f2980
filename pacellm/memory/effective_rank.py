"""How many directions a bank's keys really have."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(keys: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007) of the row-normalised keys.

    Args:
        keys: [m, F] filled keys. Returns 0.0 for m = 0, 1.0 where all keys point the same way.
    """
    if keys.shape[0] == 0:
        return 0.0
    rows = torch.nn.functional.normalize(keys.to(torch.float64), dim=1)
    return rank_of_gram(rows @ rows.T)


def rank_of_gram(gram: Tensor) -> float:
    """The same from the [m, m] products of normalised keys, m > 0."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))
