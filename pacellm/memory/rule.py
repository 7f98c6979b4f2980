"""The bank's rule: PaceLLM's Algorithm 1 (arXiv 2506.17310, section 3.2.1) and the authors' released code, by steps.

A token i has inner activations x_i, a bias-free FFN output y_i and similarities s_ij = cos(x_i, K_j) with the keys of a
bank. P_i are its ``top_k`` most similar slots, N_i its ``bottom_k`` least similar ones, and u_j is how often slot j was
used. Tokens of a segment read the bank as it stood when the segment began:

1. :func:`judge`: the best similarity says hit, fuse or miss; the mean over P_i says high, mid or low.
2. :func:`weigh` and :func:`mix`: a hit recalls mean(V[P_i]) + negative_weight * mean(V[N_i]), a fuse less of it, a miss
   nothing; the output o_i is recalled and plain output together.

At the segment's end it is written:

3. :func:`merge`: each slot of P_i of mid tokens moves towards their mean. High tokens write nothing.
4. :func:`replace`: low tokens take slots in the order of :func:`replacement_key`.

``PAConfig.preset`` chooses where paper and code differ. All of it is masks and indices, so nothing waits for a device.
Who calls this: ``segment.py`` for prompts, ``decode_cpu.py`` and ``decode_device.py`` for decoded tokens, which are
segments of one. ``decode_triton.py`` says the same in Triton.

Shapes: n tokens, F inner size, H hidden size, M slots, k = min(top_k, M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.state import Slots


class Rule(NamedTuple):
    """What presets differ in: numbers that hold for all tokens, or [n] tensors where each has its own.

    Attributes:
        high, low: similarities that part hits, fuses and misses.
        mix, rest: shares of memory and plain output in the output.
        is_paper: Algorithm 1.
    """

    high: float | Tensor
    low: float | Tensor
    mix: float | Tensor
    rest: float | Tensor
    is_paper: bool | Tensor

    @classmethod
    def of(cls, config: PAConfig) -> Rule:
        """That of all tokens."""
        return cls(config.high, config.low, config.mix, 1.0 - config.mix, config.is_paper)


@dataclass(frozen=True)
class Verdict:
    """What similarities mean for n tokens.

    Attributes:
        hit, fuse: [n] bool, what is read.
        empty: [1] or [n] bool, the bank has nothing yet.
        slots: [n, k] the most similar slots P_i, best first.
        used: [k] or [n, k] bool, which of them exist.
        high, mid, low: [n] bool, what is written.
    """

    hit: Tensor
    fuse: Tensor
    empty: Tensor
    slots: Tensor
    used: Tensor
    high: Tensor
    mid: Tensor
    low: Tensor

    @property
    def recalls(self) -> Tensor:
        """[n] bool: tokens whose output is not the plain one."""
        return self.hit | self.fuse

    def at(self, rows: Tensor) -> Verdict:
        """That of some of the tokens."""
        shared = self.used.ndim == 1  # one bank for all
        return Verdict(
            self.hit[rows],
            self.fuse[rows],
            self.empty if shared else self.empty[rows],
            self.slots[rows],
            self.used if shared else self.used[rows],
            self.high[rows],
            self.mid[rows],
            self.low[rows],
        )


def judge(similarity: Tensor, filled: Tensor, config: PAConfig, rule: Rule) -> Verdict:
    """Hit, fuse or miss, and what becomes of each token.

    Args:
        similarity: [n, M] cosines.
        filled: slots in use: [] for all tokens, or [n, 1] where each has a bank of its own.
        config: of the banks.
        rule: thresholds.
    """
    slots, device = similarity.shape[1], similarity.device
    exists = torch.arange(slots, device=device) < filled
    best, best_slots = similarity.masked_fill(~exists, -torch.inf).topk(min(config.top_k, slots), dim=1)
    used = torch.arange(best.shape[1], device=device) < filled
    mean = _sequential_sum(best.masked_fill(~used, 0.0)) / used.sum(-1).clamp(min=1)

    empty = (filled == 0).view(-1)
    sigma = best[:, 0]
    hit = ~empty & (sigma > rule.high)
    fuse = ~empty & (sigma > rule.low) & ~hit
    low = empty | (mean <= rule.low)
    high = ~low & (mean > rule.high)
    return Verdict(hit, fuse, empty, best_slots, used, high, ~high & ~low, low)


def _sequential_sum(columns: Tensor) -> Tensor:
    """Row sums of a narrow [n, k] tensor, added left to right whatever n is."""
    total = columns[:, 0]
    for column in range(1, columns.shape[1]):
        total = total + columns[:, column]
    return total


def weigh(similarity: Tensor, filled: Tensor, found: Verdict, config: PAConfig) -> Tensor:
    """[n, M] shares of the slots in what is recalled: the mean of the best, and ``negative_weight`` of the mean of the
    worst. ``filled`` as :func:`judge` takes it."""
    slots, device = similarity.shape[1], similarity.device
    exists = torch.arange(slots, device=device) < filled
    remembers = found.recalls.to(similarity.dtype)
    share = remembers * torch.where(found.fuse, config.fuse_weight, 1.0).to(similarity.dtype)
    weights = torch.zeros_like(similarity)
    positive = share[:, None] * found.used.to(similarity.dtype) / found.used.sum(-1, keepdim=True).clamp(min=1)
    weights.scatter_add_(1, found.slots, positive)
    count = min(config.bottom_k, slots)
    if count:
        worst = similarity.masked_fill(~exists, torch.inf).topk(count, dim=1, largest=False).indices
        real = (torch.arange(count, device=device) < filled).to(similarity.dtype)
        negative = config.negative_weight * remembers[:, None] * real / real.sum(-1, keepdim=True).clamp(min=1)
        weights.scatter_add_(1, worst, negative)
    return weights


def mix(recalled: Tensor, y: Tensor, found: Verdict, config: PAConfig, rule: Rule) -> Tensor:
    """[n, H] outputs; a miss and an empty bank give y to the bit."""
    if isinstance(rule.mix, Tensor) and isinstance(rule.rest, Tensor):
        fused = (found.fuse & rule.is_paper)[:, None]
        recalled = torch.where(fused, recalled + (1.0 - config.fuse_weight) * y, recalled)
        share, rest = rule.mix[:, None], rule.rest[:, None]
        mixed = torch.where(share == 1.0, recalled, rest * y + share * recalled)
    else:
        if rule.is_paper:
            recalled = torch.where(found.fuse[:, None], recalled + (1.0 - config.fuse_weight) * y, recalled)
        mixed = recalled if rule.mix == 1.0 else rule.rest * y + rule.mix * recalled
    return torch.where(found.recalls[:, None], mixed, y)


def merge(
    slots: Slots,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    clock: Tensor,
    momentum: float,
    mask: Tensor | None = None,
) -> None:
    """K_j becomes momentum * K_j + (1 - momentum) * mean(x), V_j the same of outputs, and u_j grows by one.

    Args:
        slots: of one bank or of many; changed in place.
        places: [P] int64, the slots j.
        keys, values: [P, F] and [P, H] means in ``compute_dtype``, or one row for all.
        clock: [] or [P] int64, the number of this write.
        mask: [P] bool, the places where anything happens; None is all of them.
    """
    for stored, mean in ((slots.keys, keys), (slots.values, values)):
        old = stored.index_select(0, places).to(mean.dtype)
        merged = old.mul_(momentum).add_((1.0 - momentum) * mean)
        _put(stored, places, merged.to(stored.dtype), mask)
    slots.usage.index_add_(0, places, torch.ones_like(places) if mask is None else mask.long())
    _put(slots.stamp, places, clock.expand_as(places), mask)


def replacement_key(usage: Tensor, stamp: Tensor, clock: Tensor, config: PAConfig) -> Tensor:
    """[..., M] int64: low tokens take slots in ascending order of this, ties by index.

    That is free slots, which have no use, by index, and then filled ones by use; with ``ties`` of ``age`` those of
    equal use by the write that last changed them.

    Args:
        usage, stamp: [..., M].
        clock: [...], writes so far.
    """
    return usage * (clock[..., None] + 1) + stamp if config.ties == "age" else usage


def replace(
    slots: Slots, places: Tensor, keys: Tensor, values: Tensor, clock: Tensor, mask: Tensor | None = None
) -> None:
    """K_j becomes x, V_j becomes o and u_j one; arguments as of :func:`merge`, each place with a token of its own."""
    _put(slots.keys, places, keys.to(slots.keys.dtype), mask)
    _put(slots.values, places, values.to(slots.values.dtype), mask)
    _put(slots.usage, places, torch.ones_like(places), mask)
    _put(slots.stamp, places, clock.expand_as(places), mask)


def _put(stored: Tensor, places: Tensor, new: Tensor, mask: Tensor | None) -> None:
    """New rows [P, ...] at their places, where the mask holds."""
    if mask is not None:
        new = torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, stored.index_select(0, places))
    stored.index_copy_(0, places, new)
