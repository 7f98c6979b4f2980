"""A bank as a picture: how alike its keys are, how often slots were used and when they were last written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.memory.effective_rank import effective_rank
from pacellm.memory.state import BankState


@dataclass(frozen=True)
class BankMap:
    """Some slots of a bank, side by side.

    Attributes:
        filled: slots in use of the whole bank. clock: writes so far.
        start: number of the first slot here.
        cosines: [n, n] int8, of the keys in hundredths.
        usage, stamp: [n] int64.
        rank: effective rank of all filled keys.
    """

    filled: int
    clock: int
    start: int
    cosines: Tensor
    usage: Tensor
    stamp: Tensor
    rank: float


def copy_bank(bank: BankState) -> BankState:
    """A bank's filled slots in host memory, for :func:`map_bank`; values and counters are left out."""
    filled = int(bank.filled)
    keys, usage, stamp = (part[:filled].cpu().clone() for part in (bank.keys, bank.usage, bank.stamp))
    nothing = torch.empty(0)
    return BankState(keys, nothing, usage, stamp, torch.tensor(filled), bank.clock.cpu().clone(), nothing)


def map_bank(bank: BankState, start: int, most: int) -> BankMap:
    """``most`` filled slots from ``start`` on."""
    part = slice(start, start + most)
    rows = torch.nn.functional.normalize(bank.keys[part].double(), dim=1)
    cosines = (100 * rows @ rows.T).round().clamp(-100, 100).to(torch.int8)
    return BankMap(
        int(bank.filled), int(bank.clock), start, cosines, bank.usage[part], bank.stamp[part], effective_rank(bank.keys)
    )
