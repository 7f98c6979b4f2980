"""Reading and writing one bank by segments: pure functions over tensors.

A segment reads the bank as it stood at the segment's start. While it is incomplete its effect is *staged*
(:func:`stage`) and applied once at its end (:func:`write`), so that how a prompt is cut into engine steps cannot change
a bit: on CPU every sum runs in token order. Under ``observe`` what is computed here is fed to the bank and counted, and
whoever called returns the plain outputs.

Shapes and the rule itself: ``rule.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.rule import Rule, Verdict, judge, merge, mix, replace, replacement_key, weigh
from pacellm.memory.similarity import Total, cosine
from pacellm.memory.state import MERGES, REPLACEMENTS, BankState, Stage, compute_dtype
from pacellm.rows import pad_rows


@dataclass(frozen=True)
class Read:
    """One read of n tokens: ``output`` [n, H], what was found, and [4] int64 ``counts`` of outcomes in the order of
    ``COUNTERS``. Under ``observe`` the output of a token that nothing is written of is the plain one."""

    output: Tensor
    found: Verdict
    counts: Tensor


def read(bank: BankState, x: Tensor, y: Tensor, config: PAConfig, total: Total | None = None) -> Read:
    """Read n tokens against the bank; nothing of it changes.

    Args:
        bank: the bank as it stood when the segment began.
        x: [n, F] inner activations.
        y: [n, H] bias-free FFN outputs of the same tokens.
        config: thresholds and weights.
        total: sums over the ranks that F is split over, where it is.
    """
    n, wide = x.shape[0], compute_dtype(x.dtype)
    similarity = cosine(pad_rows(x), bank.keys, wide, total)[:n]
    rule = Rule.of(config)
    found = judge(similarity, bank.filled, config, rule)
    missed = ~(found.recalls | found.empty)
    counts = torch.stack([found.hit.sum(), found.fuse.sum(), missed.sum(), found.empty.expand(n).sum()])
    rows = None if config.acts else _selected(found.recalls & ~found.high)  # the others write no output of theirs
    output = _recalled(bank, similarity, found, y, config, rule, rows)
    return Read(output, found, counts)


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
        _count_slots(staged.raised, result.found, result.found.high)
    mid = _selected(result.found.mid)
    if mid is None or len(mid):
        _count_slots(staged.touched, result.found, result.found.mid)
        (_add_per_slot if config.is_paper else _add_all)(staged, result, x, mid)
    _keep_low(staged, result, x)


def write(bank: BankState, staged: Stage, config: PAConfig) -> None:
    """Apply a finished segment's stage to the bank and clear the stage."""
    settle(bank, staged)
    bank.clock.add_(1)
    bank.usage.add_(staged.raised[:-1])
    _merge(bank, staged, config)
    _replace(bank, staged, config)
    staged.clear()


# -- staging -----------------------------------------------------------------------------------------------


def _selected(mask: Tensor) -> Tensor | None:
    """Row numbers where the mask holds; None on a device where asking would wait for it."""
    return mask.nonzero()[:, 0] if mask.device.type == "cpu" else None


def _count_slots(counts: Tensor, found: Verdict, mask: Tensor) -> None:
    scratch = counts.shape[0] - 1
    target = torch.where(mask[:, None] & found.used, found.slots, scratch)
    counts.scatter_add_(0, target.flatten(), torch.ones_like(target).flatten())


def _add_all(staged: Stage, result: Read, x: Tensor, mid: Tensor | None) -> None:
    """All mid tokens into one sum, in token order."""
    staged.counts[0] += result.found.mid.sum()
    wide = staged.sum_keys.dtype
    if mid is None:
        mask = result.found.mid[:, None].to(wide)
        staged.sum_keys[0] += (x.to(wide) * mask).sum(0)
        staged.sum_values[0] += (result.output.to(wide) * mask).sum(0)
        return
    row = torch.zeros_like(mid)
    staged.sum_keys.index_add_(0, row, x[mid].to(wide))
    staged.sum_values.index_add_(0, row, result.output[mid].to(wide))


def _add_per_slot(staged: Stage, result: Read, x: Tensor, mid: Tensor | None) -> None:
    """Each mid token into the sums of its own slots, in token order; 64 tokens at a time bound the copies."""
    rows = mid if mid is not None else torch.arange(x.shape[0], device=x.device)
    scratch, wide, found = staged.counts.shape[0] - 1, staged.sum_keys.dtype, result.found
    for part in rows.split(64):
        keep = found.mid[part][:, None] & found.used
        target = torch.where(keep, found.slots[part], scratch).flatten()
        repeated = part.repeat_interleave(found.slots.shape[1])
        staged.counts.scatter_add_(0, target, torch.ones_like(target))
        staged.sum_keys.index_add_(0, target, x[repeated].to(wide))
        staged.sum_values.index_add_(0, target, result.output[repeated].to(wide))


def _keep_low(staged: Stage, result: Read, x: Tensor) -> None:
    """The segment's first M low tokens, in token order."""
    slots, low = staged.low_keys.shape[0] - 1, result.found.low
    if x.device.type == "cpu" and not low.any():
        return
    rank = staged.num_low + low.long().cumsum(0) - 1
    staged.num_low.add_(low.sum())
    keep = low & (rank < slots)
    rows = _selected(keep)
    if rows is None:
        rows, rank = torch.arange(x.shape[0], device=x.device), torch.where(keep, rank, slots)
    staged.low_keys.index_copy_(0, rank[rows], x[rows])
    staged.low_values.index_copy_(0, rank[rows], result.output[rows])


# -- writing -----------------------------------------------------------------------------------------------


def _merge(bank: BankState, staged: Stage, config: PAConfig) -> None:
    """The means of mid tokens into the slots that they resemble."""
    touched = staged.touched[:-1] > 0
    places, mask = _selected(touched), None
    if places is None:
        places, mask = torch.arange(len(touched), device=touched.device), touched
    elif not len(places):
        return
    sums = places if config.is_paper else slice(0, 1)  # a sum for each slot, or one for all
    count = staged.counts[sums].clamp(min=1)[:, None]
    means = staged.sum_keys[sums] / count, staged.sum_values[sums] / count
    merge(bank.slots, places, *means, bank.clock, config.momentum, mask)
    bank.counters[MERGES] += touched.sum()


def _replace(bank: BankState, staged: Stage, config: PAConfig) -> None:
    """The first low tokens in place of what is free or least used."""
    size, mask = len(bank.usage), None
    count = torch.clamp(staged.num_low, max=size)
    if count.device.type == "cpu":
        if not (size := int(count)):
            return
    else:
        mask = torch.arange(size, device=count.device) < count
    key = replacement_key(bank.usage, bank.stamp, bank.clock, config)
    places = torch.argsort(key, stable=True)[:size]
    replace(bank.slots, places, staged.low_keys[:size], staged.low_values[:size], bank.clock, mask)
    bank.filled.copy_(torch.clamp(bank.filled + count, max=len(bank.usage)))
    bank.counters[REPLACEMENTS] += count
