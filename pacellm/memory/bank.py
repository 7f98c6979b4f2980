"""Reading and writing one bank: pure functions over tensors.

Source: PaceLLM (arXiv 2506.17310), section 3.2.1 and Algorithm 1, and the authors' released code; where the
two differ, ``PAConfig.preset`` chooses.

Shapes: n tokens, F inner size, H hidden size, M slots, k = top_k.
A *segment* reads the bank as it stood at the segment's start. While a segment is incomplete its effect is
*staged* (:func:`stage`) and applied once at its end (:func:`write`), so that how a prompt is cut into engine
steps cannot change a bit: on CPU every sum runs in token order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.state import (
    EMPTY,
    FUSES,
    HITS,
    MERGES,
    MISSES,
    REPLACEMENTS,
    BankState,
    Stage,
    compute_dtype,
    new_bank,
    new_stage,
)
from pacellm.rows import pad_rows

Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks of a tensor-parallel group."""


@dataclass(frozen=True)
class Read:
    """One read of n tokens: ``output`` [n, H], and what :func:`stage` needs of it."""

    output: Tensor
    slots: Tensor  # [n, k] the most similar slots, best first
    used: Tensor  # [k] bool, which of them exist
    high: Tensor  # [n] bool
    mid: Tensor  # [n] bool
    low: Tensor  # [n] bool


@dataclass(frozen=True)
class Verdict:
    """What similarities mean for n tokens. :class:`Read` explains the shared fields; ``empty`` is [1] or [n]."""

    weights: Tensor  # [n, M] of the slots in what is recalled
    hit: Tensor  # [n] bool
    fuse: Tensor  # [n] bool
    empty: Tensor
    slots: Tensor
    used: Tensor
    high: Tensor
    mid: Tensor
    low: Tensor


def read(
    bank: BankState, x: Tensor, y: Tensor, config: PAConfig, total: Total | None = None, mask: Tensor | None = None
) -> Read:
    """Read n tokens against the bank and count the outcomes.

    Args:
        total: sums over the ranks that F is split over, where it is.
        bank: the bank as it stood when the segment began.
        x: [n, F] inner activations.
        y: [n, H] bias-free FFN outputs of the same tokens.
        config: thresholds and weights.
        mask: [F] bool, the neurons that similarities are about, outside of which x is 0; None is all.
    """
    n, wide = x.shape[0], compute_dtype(x.dtype)
    keys = bank.keys if mask is None else bank.keys * mask.to(bank.keys.device)
    found = judge(_cosine(pad_rows(x), keys, wide, total)[:n], bank.filled, config)
    recalled = (pad_rows(found.weights) @ bank.values.to(wide))[:n]
    output = mix(recalled, y.to(wide), found.hit, found.fuse, config).to(y.dtype)
    missed = ~(found.hit | found.fuse | found.empty)
    counts = [found.hit.sum(), found.fuse.sum(), missed.sum(), found.empty.expand(n).sum()]
    bank.counters[:MERGES] += torch.stack(counts)
    return Read(output, found.slots, found.used, found.high, found.mid, found.low)


def judge(similarity: Tensor, filled: Tensor, config: PAConfig) -> Verdict:
    """Hit, fuse or miss, and the weights of what is recalled.

    Args:
        similarity: [n, M] cosines.
        filled: slots in use: [] for all tokens, or [n, 1] where each has a bank of its own.
        config: thresholds and weights.
    """
    slots, device = similarity.shape[1], similarity.device
    exists = torch.arange(slots, device=device) < filled
    best, best_slots = similarity.masked_fill(~exists, -torch.inf).topk(min(config.top_k, slots), dim=1)
    used = torch.arange(best.shape[1], device=device) < filled
    mean = _sequential_sum(best.masked_fill(~used, 0.0)) / used.sum(-1).clamp(min=1)

    empty = (filled == 0).view(-1)
    sigma = best[:, 0]
    hit = ~empty & (sigma > config.high)
    fuse = ~empty & (sigma > config.low) & ~hit
    weights = _weights(similarity, exists, filled, best_slots, used, hit, fuse, config)
    low = empty | (mean <= config.low)
    high = ~low & (mean > config.high)
    return Verdict(weights, hit, fuse, empty, best_slots, used, high, ~high & ~low, low)


def stage(staged: Stage, result: Read, x: Tensor, config: PAConfig) -> None:
    """Add a read's effect to the segment's stage.

    Args:
        staged: the segment's stage, changed in place.
        result: what :func:`read` returned for the tokens, in token order.
        x: [n, F] their inner activations.
        config: the same config.
    """
    if config.preset == "paper":
        _count_slots(staged.raised, result, result.high)
    mid = _selected(result.mid)
    if mid is None or len(mid):
        _count_slots(staged.touched, result, result.mid)
        (_add_per_slot if config.preset == "paper" else _add_all)(staged, result, x, mid)
    _keep_low(staged, result, x)


def write(bank: BankState, staged: Stage, config: PAConfig) -> None:
    """Apply a finished segment's stage to the bank and clear the stage."""
    slots = bank.keys.shape[0]
    bank.clock.add_(1)
    bank.usage.add_(staged.raised[:slots])
    _merge(bank, staged, config)
    _replace(bank, staged, config)
    staged.clear()


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


class Bank:
    """One bank as an object, for tests and tools; the engine calls the functions above on arena rows.

    Example::

        bank = Bank(PAConfig(bank_size=8), inner_size=64, hidden_size=16)
        output = bank.step(x, y)
    """

    def __init__(
        self,
        config: PAConfig | None = None,
        *,
        inner_size: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config or PAConfig()
        self.state = new_bank(self.config, inner_size, hidden_size, dtype, torch.device(device))
        self._stage = new_stage(self.config, inner_size, hidden_size, dtype, torch.device(device))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Read, then write, one segment.

        Args:
            x: [n, F] inner activations. y: [n, H] bias-free FFN outputs.

        Returns:
            [n, H], the outputs before the bias.

        Raises:
            ValueError: shapes that do not belong to this bank.
        """
        inner, hidden = self.state.keys.shape[1], self.state.values.shape[1]
        if x.ndim != 2 or y.ndim != 2 or x.shape != (y.shape[0], inner) or y.shape[1] != hidden:
            raise ValueError(f"expected x [n, {inner}] and y [n, {hidden}], got {list(x.shape)} and {list(y.shape)}")
        if not x.shape[0]:
            return y.clone()
        result = read(self.state, x, y, self.config)
        stage(self._stage, result, x, self.config)
        write(self.state, self._stage, self.config)
        return result.output

    @property
    def keys(self) -> Tensor:
        """[M, F]"""
        return self.state.keys

    @property
    def values(self) -> Tensor:
        """[M, H]"""
        return self.state.values

    @property
    def usage(self) -> Tensor:
        """[M] int64"""
        return self.state.usage

    @property
    def filled(self) -> int:
        """Slots in use."""
        return int(self.state.filled)

    @property
    def hits(self) -> int:
        """Tokens read with a similarity above ``theta_high``."""
        return int(self.state.counters[HITS])

    @property
    def fuses(self) -> int:
        """Tokens read between the thresholds."""
        return int(self.state.counters[FUSES])

    @property
    def misses(self) -> int:
        """Tokens read at or below ``theta_low``."""
        return int(self.state.counters[MISSES])

    @property
    def empty(self) -> int:
        """Tokens that met an empty bank."""
        return int(self.state.counters[EMPTY])


# -- reading -----------------------------------------------------------------------------------------------


def _cosine(x: Tensor, keys: Tensor, wide: torch.dtype, total: Total | None = None) -> Tensor:
    """[n, M] cosines; a zero vector is similar to nothing (0)."""
    x, keys = x.to(wide), keys.to(wide)
    if total is not None:
        squares = (x * x).sum(1, keepdim=True), (keys * keys).sum(1).expand(x.shape[0], -1)
        return cosines_of_parts(torch.nn.functional.linear(x, keys), *squares, total)
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True) * torch.linalg.vector_norm(keys, dim=1)
    return torch.nn.functional.linear(x, keys) / lengths.clamp(min=1e-12)


def cosines_of_parts(products: Tensor, own: Tensor, stored: Tensor, total: Total) -> Tensor:
    """[n, M] cosines where each rank holds a part of F.

    Args:
        products: [n, M]. own: [n, 1] and stored: [n, M], squares of both sides. All of them this rank's part.
        total: sums over the ranks.
    """
    slots = products.shape[1]
    products, own, stored = total(torch.cat([products, own, stored], dim=1)).split([slots, 1, slots], dim=1)
    return products / (own.sqrt() * stored.sqrt()).clamp(min=1e-12)


def _sequential_sum(columns: Tensor) -> Tensor:
    """Row sums of a narrow [n, k] tensor, added left to right whatever n is."""
    total = columns[:, 0]
    for column in range(1, columns.shape[1]):
        total = total + columns[:, column]
    return total


def _weights(
    similarity: Tensor,
    exists: Tensor,
    filled: Tensor,
    best: Tensor,
    used: Tensor,
    hit: Tensor,
    fuse: Tensor,
    config: PAConfig,
) -> Tensor:
    """[n, M] shares of the slots: the mean of the best, and ``negative_weight`` of the mean of the worst."""
    remembers = (hit | fuse).to(similarity.dtype)
    share = remembers * torch.where(fuse, config.fuse_weight, 1.0).to(similarity.dtype)
    weights = torch.zeros_like(similarity)
    positive = share[:, None] * used.to(similarity.dtype) / used.sum(-1, keepdim=True).clamp(min=1)
    weights.scatter_add_(1, best, positive)
    count = min(config.bottom_k, similarity.shape[1])
    if count:
        worst = similarity.masked_fill(~exists, torch.inf).topk(count, dim=1, largest=False).indices
        real = (torch.arange(count, device=similarity.device) < filled).to(similarity.dtype)
        negative = config.negative_weight * remembers[:, None] * real / real.sum(-1, keepdim=True).clamp(min=1)
        weights.scatter_add_(1, worst, negative)
    return weights


def mix(recalled: Tensor, y: Tensor, hit: Tensor, fuse: Tensor, config: PAConfig) -> Tensor:
    """[n, H] outputs; a miss and an empty bank give y to the bit."""
    if config.preset == "paper":
        recalled = torch.where(fuse[:, None], recalled + (1.0 - config.fuse_weight) * y, recalled)
    mixed = recalled if config.mix == 1.0 else (1.0 - config.mix) * y + config.mix * recalled
    return torch.where((hit | fuse)[:, None], mixed, y)


# -- staging -----------------------------------------------------------------------------------------------


def _selected(mask: Tensor) -> Tensor | None:
    """Row numbers where the mask holds; None on a device where asking would wait for it."""
    return mask.nonzero()[:, 0] if mask.device.type == "cpu" else None


def _count_slots(counts: Tensor, result: Read, mask: Tensor) -> None:
    scratch = counts.shape[0] - 1
    target = torch.where(mask[:, None] & result.used, result.slots, scratch)
    counts.scatter_add_(0, target.flatten(), torch.ones_like(target).flatten())


def _add_all(staged: Stage, result: Read, x: Tensor, mid: Tensor | None) -> None:
    """All mid tokens into one sum, in token order."""
    staged.counts[0] += result.mid.sum()
    wide = staged.sum_keys.dtype
    if mid is None:
        mask = result.mid[:, None].to(wide)
        staged.sum_keys[0] += (x.to(wide) * mask).sum(0)
        staged.sum_values[0] += (result.output.to(wide) * mask).sum(0)
        return
    row = torch.zeros_like(mid)
    staged.sum_keys.index_add_(0, row, x[mid].to(wide))
    staged.sum_values.index_add_(0, row, result.output[mid].to(wide))


def _add_per_slot(staged: Stage, result: Read, x: Tensor, mid: Tensor | None) -> None:
    """Each mid token into the sums of its own slots, in token order; 64 tokens at a time bound the copies."""
    rows = mid if mid is not None else torch.arange(x.shape[0], device=x.device)
    scratch, wide = staged.counts.shape[0] - 1, staged.sum_keys.dtype
    for part in rows.split(64):
        keep = result.mid[part][:, None] & result.used
        target = torch.where(keep, result.slots[part], scratch).flatten()
        repeated = part.repeat_interleave(result.slots.shape[1])
        staged.counts.scatter_add_(0, target, torch.ones_like(target))
        staged.sum_keys.index_add_(0, target, x[repeated].to(wide))
        staged.sum_values.index_add_(0, target, result.output[repeated].to(wide))


def _keep_low(staged: Stage, result: Read, x: Tensor) -> None:
    """The segment's first M low tokens, in token order."""
    slots = staged.low_keys.shape[0] - 1
    if x.device.type == "cpu" and not result.low.any():
        return
    rank = staged.num_low + result.low.long().cumsum(0) - 1
    staged.num_low.add_(result.low.sum())
    keep = result.low & (rank < slots)
    rows = _selected(keep)
    if rows is None:
        rows, rank = torch.arange(x.shape[0], device=x.device), torch.where(keep, rank, slots)
    staged.low_keys.index_copy_(0, rank[rows], x[rows])
    staged.low_values.index_copy_(0, rank[rows], result.output[rows])


# -- writing -----------------------------------------------------------------------------------------------


def _merge(bank: BankState, staged: Stage, config: PAConfig) -> None:
    slots = bank.keys.shape[0]
    touched = staged.touched[:slots] > 0
    if touched.device.type == "cpu" and not touched.any():
        return
    # one sum for all slots broadcasts; per-slot sums line up with the slots
    sums = slice(0, staged.counts.shape[0] - 1)
    count = staged.counts[sums].clamp(min=1)[:, None]
    for stored, total in ((bank.keys, staged.sum_keys), (bank.values, staged.sum_values)):
        mean = total[sums] / count
        merged = config.momentum * stored.to(mean.dtype) + (1.0 - config.momentum) * mean
        stored.copy_(torch.where(touched[:, None], merged.to(stored.dtype), stored))
    bank.usage.add_(touched)
    bank.stamp.copy_(torch.where(touched, bank.clock, bank.stamp))
    bank.counters[MERGES] += touched.sum()


def _replace(bank: BankState, staged: Stage, config: PAConfig) -> None:
    slots = bank.keys.shape[0]
    if bank.keys.device.type == "cpu" and not staged.num_low:
        return
    index = torch.arange(slots, device=bank.keys.device)
    order = torch.argsort(bank.stamp, stable=True) if config.ties == "age" else index
    use = torch.where(index < bank.filled, bank.usage, -1 - slots + index)  # free slots first, by index
    order = order[torch.argsort(use[order], stable=True)]
    turn = torch.empty_like(order)
    turn[order] = index
    taken = turn < staged.num_low
    for stored, low in ((bank.keys, staged.low_keys), (bank.values, staged.low_values)):
        stored.copy_(torch.where(taken[:, None], low[turn], stored))
    bank.usage.copy_(torch.where(taken, 1, bank.usage))
    bank.stamp.copy_(torch.where(taken, bank.clock, bank.stamp))
    bank.counters[REPLACEMENTS] += taken.sum()
    bank.filled.copy_(torch.minimum(bank.filled + staged.num_low, torch.full_like(bank.filled, slots)))
