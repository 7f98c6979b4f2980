"""Decoded tokens told by tensors alone, and the presets' numbers where kernels find them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pacellm.config import PRESETS, PAConfig
from pacellm.memory.rule import Rule

OBSERVE, PAPER = PRESETS.index("observe"), PRESETS.index("paper")


class DecodedTokens(NamedTuple):
    """One decoded token of each of B sequences.

    Attributes:
        rows: [B] int64, each one's row of the arena; the last row for what is padding.
        live: [B] bool, tokens that count at all.
        writes: [B] bool, tokens that change their bank.
        presets: [B] int64, each one's preset by its number in ``PRESETS``.
        sets: [B] int64, each one's row of the table of working sets; None where all tokens use all experts.
    """

    rows: Tensor
    live: Tensor
    writes: Tensor
    presets: Tensor
    sets: Tensor | None = None

    @property
    def acts(self) -> Tensor:
        """[B] bool: tokens whose outputs change."""
        return self.live & (self.presets != OBSERVE)


@cache
def rules(config: PAConfig, device: torch.device) -> Tensor:
    """[P, 4] float64: high, low, mix and rest of :class:`Rule` for each of ``PRESETS``, kept on the device."""
    numbers = [Rule.of(config.of(preset))[:4] for preset in PRESETS]
    return torch.tensor(numbers, dtype=torch.float64, device=device)
