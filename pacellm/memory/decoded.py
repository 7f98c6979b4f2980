"""Decoded tokens, each a segment of its own, of many sequences at once: what ``bank.py`` does for one, to the bit.

A decode step reads one token against each sequence's own bank. Done one by one, some fifty small operations each cost
more than all arithmetic. Here only the two products with a bank are done one by one, and a write touches only the
slots that change. On a CPU only, because it asks for the outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.bank import Rule, Total, Verdict, cosines_of_parts, judge, mix, selected, weigh, written
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
    rule = Rule.of(config)
    filled = torch.stack([bank.filled for bank in banks])[:, None]
    similarity = cosines([bank.keys for bank in banks], x.to(compute_dtype(x.dtype)), total, masks)
    found = judge(similarity, filled, config, rule)
    output = _recalled(banks, similarity, filled, found, y, config, rule)

    codes = torch.where(found.empty, EMPTY, torch.where(found.hit, HITS, torch.where(found.fuse, FUSES, MISSES)))
    counts = found.used.sum(-1).tolist()
    high, low = found.high.tolist(), found.low.tolist()
    for row, (bank, code) in enumerate(zip(banks, codes.tolist(), strict=True)):
        bank.counters.numpy()[code] += 1
        if not writes[row]:
            continue
        bank.clock.add_(1)
        slots = found.slots[row, : counts[row]]
        if low[row]:
            _replace(bank, x[row], output[row], config)
        elif not high[row]:
            _merge(bank, slots, x[row], output[row], config)
        elif config.is_paper:
            bank.usage.numpy()[slots.numpy()] += 1
    return output


def _recalled(
    banks: Sequence[BankState],
    similarity: Tensor,
    filled: Tensor,
    found: Verdict,
    y: Tensor,
    config: PAConfig,
    rule: Rule,
) -> Tensor:
    """[N, H] outputs, under ``observe`` only those that may be written."""
    wide, plain = compute_dtype(y.dtype), y
    rows = selected(written(found)) if not config.acts else None
    if rows is not None:
        if not len(rows):
            return plain
        similarity, filled, found, y = similarity[rows], filled[rows], found.at(rows), y[rows]
        banks = [banks[row] for row in rows.tolist()]
    weights = weigh(similarity, filled, found, config)
    recalled = each(weights, [bank.values.to(wide) for bank in banks])
    output = mix(recalled, y.to(wide), found, config, rule).to(y.dtype)
    return output if rows is None else plain.index_copy(0, rows, output)


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


def _merge(bank: BankState, slots: Tensor, x: Tensor, output: Tensor, config: PAConfig) -> None:
    wide = compute_dtype(x.dtype)
    for stored, new in ((bank.keys, x), (bank.values, output)):
        merged = config.momentum * stored[slots].to(wide) + (1.0 - config.momentum) * (new.to(wide) + 0.0)
        stored.index_copy_(0, slots, merged.to(stored.dtype))
    places = slots.numpy()
    bank.usage.numpy()[places] += 1
    bank.stamp.numpy()[places] = int(bank.clock)
    bank.counters.numpy()[MERGES] += len(places)


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
