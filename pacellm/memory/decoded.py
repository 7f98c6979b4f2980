"""Decoded tokens, each a segment of its own, of many sequences at once: what ``bank.py`` does for one, to the bit.

A decode step reads one token against each sequence's own bank. Done one by one, some fifty small operations each cost
more than all arithmetic. Here only the two products with a bank are done one by one, and a write touches only the
slots that change. On a CPU only, because it asks for the outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.bank import Rule, Total, Verdict, cosines_of_parts, mix, weigh
from pacellm.memory.state import EMPTY, FUSES, HITS, MERGES, MISSES, REPLACEMENTS, BankState, compute_dtype
from pacellm.rows import pad_rows

_TOGETHER = 4  # rows of a product of one of them; a single row's bits would depend on where in memory it lies


def feed(
    banks: Sequence[BankState],
    writes: Sequence[bool],
    x: Tensor,
    y: Tensor,
    config: PAConfig,
    total: Total | None = None,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Read one token against each bank and, where asked, write it.

    Args:
        banks: N banks of one layer, none twice and none in the middle of a segment.
        writes: for each whether the token changes it.
        total: sums over the ranks that F is split over, where it is.
        x: [N, F] inner activations. y: [N, H] bias-free FFN outputs.
        masks: for each [F] bool, the neurons that its similarities are about, outside of which x is 0; None is all.

    Returns:
        [N, H], the outputs before the bias; under ``observe`` the plain ones where nothing is written of a token.
    """
    similarity = cosines([bank.keys for bank in banks], x.to(compute_dtype(x.dtype)), total, masks)
    found = _judge(similarity, [int(bank.filled) for bank in banks], config)
    wanted = found.hit | found.fuse if config.acts else (found.hit | found.fuse) & ~found.high & np.asarray(writes)
    output = _recalled(banks, similarity, found, wanted.nonzero()[0], y, config)
    for row, bank in enumerate(banks):
        bank.counters.numpy()[found.code(row)] += 1
        if not writes[row]:
            continue
        bank.clock.add_(1)
        slots = found.slots[row, : found.counts[row]]
        if found.low[row]:
            _replace(bank, x[row], output[row], config)
        elif not found.high[row]:
            _merge(bank, slots, x[row], output[row], config)
        elif config.is_paper:
            bank.usage.numpy()[slots] += 1
    return output


class _Found(NamedTuple):
    """A :class:`Verdict` of N tokens in NumPy.

    Attributes:
        slots: [N, k] the most similar slots, of which the first ``counts`` [N] exist.
        filled: [N] slots in use in each one's bank.
    """

    hit: np.ndarray
    fuse: np.ndarray
    high: np.ndarray
    low: np.ndarray
    slots: np.ndarray
    counts: np.ndarray
    filled: np.ndarray

    def code(self, row: int) -> int:
        """Which counter a token is."""
        if not self.filled[row]:
            return EMPTY
        return HITS if self.hit[row] else FUSES if self.fuse[row] else MISSES

    def verdict(self, rows: np.ndarray) -> Verdict:
        """Of some of the tokens, in torch."""
        hit, fuse, high, low = (torch.from_numpy(flags[rows]) for flags in self[:4])
        used = torch.from_numpy(np.arange(self.slots.shape[1]) < self.counts[rows, None])
        empty = torch.from_numpy(self.filled[rows] == 0)
        return Verdict(hit, fuse, empty, torch.from_numpy(self.slots[rows]), used, high, ~high & ~low, low)


def _judge(similarity: Tensor, filled: list[int], config: PAConfig) -> _Found:
    """What :func:`pacellm.memory.bank.judge` does, to the bit. Of few tokens, torch's thirty small operations take
    longer than the products."""
    slots, lengths = similarity.shape[1], np.asarray(filled)
    if min(filled) < slots:
        similarity = similarity.masked_fill(torch.arange(slots) >= torch.from_numpy(lengths)[:, None], -torch.inf)
    best, best_slots = (part.numpy() for part in similarity.topk(min(config.top_k, slots), dim=1))
    number, most = best.dtype.type, best.shape[1]
    counts = np.minimum(lengths, most)
    real = best if min(filled) >= most else np.where(np.arange(most) < counts[:, None], best, number(0))
    mean = np.add.accumulate(real, axis=1)[:, -1] / np.maximum(counts, 1).astype(best.dtype)  # added left to right
    some, high, low = lengths > 0, number(config.high), number(config.low)
    hit = some & (best[:, 0] > high)
    fuse = some & (best[:, 0] > low) & ~hit
    is_low = ~some | (mean <= low)
    return _Found(hit, fuse, ~is_low & (mean > high), is_low, best_slots, counts, lengths)


def _recalled(
    banks: Sequence[BankState], similarity: Tensor, found: _Found, rows: np.ndarray, y: Tensor, config: PAConfig
) -> Tensor:
    """[N, H] outputs: those of ``rows`` with what is recalled, the others plain."""
    if not len(rows):
        return y
    wide, chosen, verdict = compute_dtype(y.dtype), torch.from_numpy(rows), found.verdict(rows)
    filled = torch.from_numpy(found.filled[rows])[:, None]
    weights = weigh(similarity[chosen], filled, verdict, config)
    recalled = each(weights, [banks[row].values.to(wide) for row in rows])
    output = mix(recalled, y[chosen].to(wide), verdict, config, Rule.of(config))
    return y.index_copy(0, chosen, output.to(y.dtype))


def cosines(
    stored: Sequence[Tensor],
    x: Tensor,
    total: Total | None = None,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """[N, M] cosines of each row with its own bank's keys."""
    x, products, lengths = pad_rows(x, _TOGETHER), [], []
    for row, keys in enumerate(stored):  # one bank after the other: what was just read is still near
        keys = keys.to(x.dtype)
        if masks is not None and (mask := masks[row]) is not None and total is None:
            keys = keys * mask
        lengths.append((keys * keys).sum(1) if total is not None else torch.linalg.vector_norm(keys, dim=1))
        products.append(_product(x, row, keys.T))
    own = x[: len(products)]
    if total is not None:
        squares = (own * own).sum(1, keepdim=True)
        return cosines_of_parts(torch.stack(products), squares, torch.stack(lengths), total)
    both = torch.linalg.vector_norm(x, dim=1, keepdim=True)[: len(products)] * torch.stack(lengths)
    return torch.stack(products) / both.clamp(min=1e-12)


def each(rows: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Row i times matrix i."""
    rows = pad_rows(rows, _TOGETHER)
    return torch.stack([_product(rows, row, matrix) for row, matrix in enumerate(matrices)])


def _product(rows: Tensor, row: int, matrix: Tensor) -> Tensor:
    """One row times a matrix, as one of ``_TOGETHER`` rows: that fixes its bits."""
    first = row - row % _TOGETHER
    return (rows[first : first + _TOGETHER] @ matrix)[row - first]


def _merge(bank: BankState, slots: np.ndarray, x: Tensor, output: Tensor, config: PAConfig) -> None:
    wide, places = compute_dtype(x.dtype), torch.from_numpy(slots)
    for stored, new in ((bank.keys, x), (bank.values, output)):
        merged = config.momentum * stored[places].to(wide) + (1.0 - config.momentum) * (new.to(wide) + 0.0)
        stored.index_copy_(0, places, merged.to(stored.dtype))
    bank.usage.numpy()[slots] += 1
    bank.stamp.numpy()[slots] = int(bank.clock)
    bank.counters.numpy()[MERGES] += len(slots)


def _replace(bank: BankState, x: Tensor, output: Tensor, config: PAConfig) -> None:
    usage, stamp, filled = bank.usage.numpy(), bank.stamp.numpy(), int(bank.filled)
    if filled < len(usage):
        slot = filled
        bank.filled.add_(1)
    elif config.ties == "age":
        least = (usage == usage.min()).nonzero()[0]
        slot = int(least[stamp[least].argmin()])
    else:
        slot = int(usage.argmin())
    bank.keys[slot] = x
    bank.values[slot] = output
    usage[slot], stamp[slot] = 1, int(bank.clock)
    bank.counters.numpy()[REPLACEMENTS] += 1
