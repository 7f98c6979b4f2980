"""The tensors of a bank and of a segment's stage.

Shapes: F inner size, H hidden size, M slots. Values are stored after the down-projection, which is exact because
reads, merges and replacements are linear in them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.reads import OUTCOMES

HITS, FUSES, MISSES, EMPTY, MERGES, REPLACEMENTS = range(6)
COUNTERS = (*OUTCOMES, "merges", "replacements")


class Slots(NamedTuple):
    """Slots of one bank, or those of many in one row: keys [N, F], values [N, H], usage [N], stamp [N]."""

    keys: Tensor
    values: Tensor
    usage: Tensor
    stamp: Tensor


class BankState(NamedTuple):
    """One bank. The functions below change the tensors in place.

    Attributes:
        keys: [M, F] inner activations.
        values: [M, H] bias-free FFN outputs.
        usage: [M] int64 uses.
        stamp: [M] int64, the write at which a slot was last merged or replaced.
        filled: [] int64, slots in use; they fill in index order.
        clock: [] int64, writes so far.
        counters: [6] int64, in the order of ``COUNTERS``.
    """

    keys: Tensor
    values: Tensor
    usage: Tensor
    stamp: Tensor
    filled: Tensor
    clock: Tensor
    counters: Tensor

    @property
    def slots(self) -> Slots:
        """All slots side by side, in place; of a bank, or of an arena."""
        if self.usage.ndim == 1:
            return Slots(*self[:4])
        keys, values = (stored.view(-1, stored.shape[-1]) for stored in (self.keys, self.values))
        return Slots(keys, values, self.usage.view(-1), self.stamp.view(-1))

    def clear(self) -> None:
        """Empty the bank; every tensor is overwritten."""
        for tensor in self:
            tensor.zero_()

    def copy_(self, other: BankState) -> None:
        """Overwrite every tensor with ``other``'s."""
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_(theirs)


Banks = dict[int, BankState]
"""One row's banks, by layer."""


class Stage(NamedTuple):
    """What an incomplete segment will write. S = M under ``paper``, else 1; the last row is scratch.

    Attributes:
        touched: [M + 1] int64, uses by mid tokens of the segment.
        raised: [M + 1] int64, uses by high tokens (``paper`` only).
        counts: [S + 1] int64, tokens in each sum.
        sum_keys: [S + 1, F] and sum_values: [S + 1, H], sums over mid tokens.
        low_keys: [M + 1, F] and low_values: [M + 1, H], the first M low tokens.
        num_low: [] int64, low tokens seen, not capped.
        reads: [4] int64, what the segment's reads came to, in the order of ``COUNTERS``.
    """

    touched: Tensor
    raised: Tensor
    counts: Tensor
    sum_keys: Tensor
    sum_values: Tensor
    low_keys: Tensor
    low_values: Tensor
    num_low: Tensor
    reads: Tensor

    def clear(self) -> None:
        """Forget what was staged."""
        for tensor in self:
            tensor.zero_()


@cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Similarities and sums run in at least float32."""
    return torch.promote_types(dtype, torch.float32)


def new_bank(
    config: PAConfig, inner_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> BankState:
    """An empty bank."""
    slots = config.bank_size
    return BankState(
        keys=torch.zeros(slots, inner_size, dtype=dtype, device=device),
        values=torch.zeros(slots, hidden_size, dtype=dtype, device=device),
        usage=torch.zeros(slots, dtype=torch.int64, device=device),
        stamp=torch.zeros(slots, dtype=torch.int64, device=device),
        filled=torch.zeros((), dtype=torch.int64, device=device),
        clock=torch.zeros((), dtype=torch.int64, device=device),
        counters=torch.zeros(len(COUNTERS), dtype=torch.int64, device=device),
    )


def new_stage(config: PAConfig, inner_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Stage:
    """A stage with nothing in it; sums in ``compute_dtype(dtype)``."""
    slots = config.bank_size
    sums = slots if config.is_paper else 1
    wide = compute_dtype(dtype)
    return Stage(
        touched=torch.zeros(slots + 1, dtype=torch.int64, device=device),
        raised=torch.zeros(slots + 1, dtype=torch.int64, device=device),
        counts=torch.zeros(sums + 1, dtype=torch.int64, device=device),
        sum_keys=torch.zeros(sums + 1, inner_size, dtype=wide, device=device),
        sum_values=torch.zeros(sums + 1, hidden_size, dtype=wide, device=device),
        low_keys=torch.zeros(slots + 1, inner_size, dtype=dtype, device=device),
        low_values=torch.zeros(slots + 1, hidden_size, dtype=dtype, device=device),
        num_low=torch.zeros((), dtype=torch.int64, device=device),
        reads=torch.zeros(MERGES, dtype=torch.int64, device=device),
    )


def banks_nbytes(banks: Banks) -> int:
    """Bytes of banks."""
    return sum(tensor.nbytes for bank in banks.values() for tensor in bank)


def copy_banks(banks: Banks, *, pin: bool = False) -> Banks:
    """Copies in host memory."""
    return {layer: type(bank)(*(_to_host(tensor, pin) for tensor in bank)) for layer, bank in banks.items()}


def _to_host(tensor: Tensor, pin: bool) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
    return host.copy_(tensor, non_blocking=pin)
