"""Reading and writing one bank: pure functions over tensors.

Source: PaceLLM (arXiv 2506.17310), section 3.2.1 and Algorithm 1, and the authors' released code; where the
two differ, ``PAConfig.preset`` chooses. Under ``observe`` what is computed here is fed to the bank and counted, and
whoever called returns the plain outputs.

Shapes: n tokens, F inner size, H hidden size, M slots, k = top_k.
A *segment* reads the bank as it stood at the segment's start. While a segment is incomplete its effect is
*staged* (:func:`stage`) and applied once at its end (:func:`write`), so that how a prompt is cut into engine
steps cannot change a bit: on CPU every sum runs in token order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
class Read:
    """One read of n tokens: ``output`` [n, H], and what :func:`stage` needs of it.

    Under ``observe`` the output of a token that nothing is written of is the plain one.
    """

    output: Tensor
    slots: Tensor  # [n, k] the most similar slots, best first
    used: Tensor  # [k] bool, which of them exist
    high: Tensor  # [n] bool
    mid: Tensor  # [n] bool
    low: Tensor  # [n] bool
    counts: Tensor  # [4] int64, outcomes in the order of ``COUNTERS``


@dataclass(frozen=True)
class Verdict:
    """What similarities mean for n tokens. :class:`Read` explains the shared fields; ``empty`` is [1] or [n]."""

    hit: Tensor  # [n] bool
    fuse: Tensor  # [n] bool
    empty: Tensor
    slots: Tensor
    used: Tensor
    high: Tensor
    mid: Tensor
    low: Tensor

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


def read(
    bank: BankState, x: Tensor, y: Tensor, config: PAConfig, total: Total | None = None, mask: Tensor | None = None
) -> Read:
    """Read n tokens against the bank; nothing of it changes.

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
    similarity = _cosine(pad_rows(x), keys, wide, total)[:n]
    rule = Rule.of(config)
    found = judge(similarity, bank.filled, config, rule)
    missed = ~(found.hit | found.fuse | found.empty)
    counts = torch.stack([found.hit.sum(), found.fuse.sum(), missed.sum(), found.empty.expand(n).sum()])
    rows = (
        None if config.acts else _selected((found.hit | found.fuse) & ~found.high)
    )  # the others write no output of theirs
    output = _recalled(bank, similarity, found, y, config, rule, rows)
    return Read(output, found.slots, found.used, found.high, found.mid, found.low, counts)


def _recalled(
    bank: BankState, similarity: Tensor, found: Verdict, y: Tensor, config: PAConfig, rule: Rule, rows: Tensor | None
) -> Tensor:
    """[n, H] outputs; with ``rows`` those of the others are the plain ones."""
    wide, plain = compute_dtype(y.dtype), y
    if rows is not None:
        if not len(rows):
            return plain
        similarity, found, y = similarity[rows], found.at(rows), y[rows]
    weights = weigh(similarity, bank.filled, found, config)
    recalled = (pad_rows(weights) @ bank.values.to(wide))[: len(weights)]
    output = mix(recalled, y.to(wide), found, config, rule).to(y.dtype)
    return output if rows is None else plain.index_copy(0, rows, output)


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


def count(staged: Stage, result: Read) -> None:
    """Add a read's outcomes to the segment's stage. They are the bank's once the segment ends, like all its effect: so
    a copy of a bank in the middle of a segment has none of them, and who feeds the segment again counts it once."""
    staged.reads.add_(result.counts)


def settle(bank: BankState, staged: Stage) -> None:
    """A segment that only reads has ended: its outcomes are the bank's."""
    bank.counters[:MERGES] += staged.reads
    staged.reads.zero_()


def stage(staged: Stage, result: Read, x: Tensor, config: PAConfig) -> None:
    """Add a read's effect to the segment's stage, its outcomes included.

    Args:
        staged: the segment's stage, changed in place.
        result: what :func:`read` returned for the tokens, in token order.
        x: [n, F] their inner activations.
        config: the same config.
    """
    count(staged, result)
    if config.is_paper:
        _count_slots(staged.raised, result, result.high)
    mid = _selected(result.mid)
    if mid is None or len(mid):
        _count_slots(staged.touched, result, result.mid)
        (_add_per_slot if config.is_paper else _add_all)(staged, result, x, mid)
    _keep_low(staged, result, x)


def write(bank: BankState, staged: Stage, config: PAConfig) -> None:
    """Apply a finished segment's stage to the bank and clear the stage."""
    slots = bank.keys.shape[0]
    settle(bank, staged)
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
            [n, H], the outputs before the bias; under ``observe`` y itself.

        Raises:
            ValueError: shapes that do not belong to this bank.
        """
        inner, hidden = self.state.keys.shape[1], self.state.values.shape[1]
        if x.ndim != 2 or y.ndim != 2 or x.shape != (y.shape[0], inner) or y.shape[1] != hidden:
            raise ValueError(f"expected x [n, {inner}] and y [n, {hidden}], got {list(x.shape)} and {list(y.shape)}")
        if not x.shape[0]:
            return y
        result = read(self.state, x, y, self.config)
        stage(self._stage, result, x, self.config)
        write(self.state, self._stage, self.config)
        return result.output if self.config.acts else y

    def recall(self, x: Tensor, y: Tensor) -> Tensor:
        """Read one segment and count its outcomes, without writing; arguments and result as of :meth:`step`, whose
        outputs are those of a preset that acts."""
        result = read(self.state, x, y, self.config)
        count(self._stage, result)
        settle(self.state, self._stage)
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


def weigh(similarity: Tensor, filled: Tensor, found: Verdict, config: PAConfig) -> Tensor:
    """[n, M] shares of the slots in what is recalled: the mean of the best, and ``negative_weight`` of the mean of the
    worst. ``filled`` as :func:`judge` takes it."""
    slots, device = similarity.shape[1], similarity.device
    exists = torch.arange(slots, device=device) < filled
    remembers = (found.hit | found.fuse).to(similarity.dtype)
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
    return torch.where((found.hit | found.fuse)[:, None], mixed, y)


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
