"""Decoded tokens of many sequences against rows of an arena, with nothing that waits for the device.

The same arithmetic as ``decode_cpu.py``, to the bit on a CPU, but every choice is a mask and every place an index, so
that a decode step can be captured in a CUDA graph: rows, flags and inputs are read from tensors whose content may
change between replays. What a masked token would write goes to the arena's last row, which nobody owns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.kernels import has_triton
from pacellm.memory.rule import Rule, Verdict, judge, merge, mix, replace, replacement_key, weigh
from pacellm.memory.similarity import Total, cosines, cosines_of_parts, together
from pacellm.memory.state import EMPTY, FUSES, HITS, MERGES, MISSES, REPLACEMENTS, BankState, compute_dtype
from pacellm.memory.tokens import PAPER, DecodedTokens, rules

Feed = Callable[..., Tensor]
"""As :func:`feed`; only torch's form takes ``total``."""


@cache
def best_feed(device: torch.device) -> Feed:
    """Triton's form on a GPU where Triton is there, else torch's."""
    if has_triton(device):
        from pacellm.memory import decode_triton

        return decode_triton.feed
    return feed


def feed(
    arena: BankState,
    tokens: DecodedTokens,
    x: Tensor,
    y: Tensor,
    config: PAConfig,
    sets: Tensor | None = None,
    total: Total | None = None,
) -> Tensor:
    """Read one token against each bank and, where asked, write it.

    Args:
        arena: one layer's banks, every tensor with a leading dimension of rows; no row twice among live tokens.
        tokens: whose tokens these are.
        x: [B, F] inner activations, zero outside of a token's set. y: [B, H] bias-free FFN outputs.
        sets: [R, E] bool, the layer's working sets, where tokens have them: similarities are about their neurons alone.
        total: sums over the ranks that F is split over, where it is.

    Returns:
        [B, H], the outputs before the bias, whether or not a token's preset lets them out.
    """
    wide = compute_dtype(x.dtype)
    filled = arena.filled[tokens.rows]
    masks = None
    if tokens.sets is not None and sets is not None:
        masks = sets[tokens.sets].repeat_interleave(x.shape[1] // sets.shape[1], dim=1)
    high, low, share, rest = rules(config, x.device)[tokens.presets].to(wide).unbind(1)
    rule = Rule(high, low, share, rest, tokens.presets == PAPER)
    similarity = _cosines(arena.keys, tokens.rows, x.to(wide), masks, total)
    found = judge(similarity, filled[:, None], config, rule)
    recalled = _recall(weigh(similarity, filled[:, None], found, config), arena.values, tokens.rows)
    output = mix(recalled, y.to(wide), found, config, rule).to(y.dtype)
    _count(arena, tokens, found)
    writes = tokens.live & tokens.writes
    arena.clock.index_add_(0, tokens.rows, writes.long())
    _merge(arena, tokens, writes, found, (x, output), config)
    _replace(arena, tokens.rows, writes & found.low, filled, (x, output), config)
    return output


def _cosines(keys: Tensor, rows: Tensor, x: Tensor, masks: Tensor | None, total: Total | None) -> Tensor:
    if x.device.type == "cpu":
        each_mask = [None] * len(x) if masks is None else list(masks)
        places = [(x, number) for number in range(len(x))]
        return cosines([keys[row] for row in rows.tolist()], places, each_mask, total)
    own = keys[rows].to(x.dtype)
    if masks is not None:
        own = own * masks[:, None]
    products = torch.bmm(own, x[:, :, None])[:, :, 0]
    if total is not None:
        return cosines_of_parts(products, (x * x).sum(1, keepdim=True), (own * own).sum(2), total)
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True) * torch.linalg.vector_norm(own, dim=2)
    return products / lengths.clamp(min=1e-12)


def _recall(weights: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    if weights.device.type == "cpu":
        found = []
        for number, row in enumerate(rows.tolist()):
            own, place = together(weights, number)
            found.append((own @ values[row].to(weights.dtype))[place])
        return torch.stack(found)
    return torch.bmm(weights[:, None], values[rows].to(weights.dtype))[:, 0]


def _count(arena: BankState, tokens: DecodedTokens, found: Verdict) -> None:
    codes = torch.where(found.empty, EMPTY, torch.where(found.hit, HITS, torch.where(found.fuse, FUSES, MISSES)))
    kinds = arena.counters.shape[1]
    arena.counters.view(-1).index_add_(0, tokens.rows * kinds + codes, tokens.live.long())


def _merge(
    arena: BankState,
    tokens: DecodedTokens,
    writes: Tensor,
    found: Verdict,
    new: tuple[Tensor, Tensor],
    config: PAConfig,
) -> None:
    """Mid tokens into the slots that they resemble; with ``paper`` a high token counts as a use of its slots."""
    slots, rows = arena.usage.shape[1], tokens.rows
    wide, width = compute_dtype(new[0].dtype), found.slots.shape[1]
    place = rows[:, None] * slots + found.slots
    raised = (writes & found.high & (tokens.presets == PAPER))[:, None] & found.used
    arena.usage.view(-1).index_add_(0, place.flatten(), raised.long().flatten())
    mask = (writes & found.mid)[:, None] & found.used
    # as sums that begin with 0
    keys, values = ((part.to(wide) + 0.0).repeat_interleave(width, 0) for part in new)
    clock = arena.clock[rows].repeat_interleave(width)
    merge(arena.slots, _target(mask, place, arena).flatten(), keys, values, clock, config.momentum)
    arena.counters.view(-1).index_add_(0, rows * arena.counters.shape[1] + MERGES, mask.sum(1))


def _replace(
    arena: BankState, rows: Tensor, mask: Tensor, filled: Tensor, new: tuple[Tensor, Tensor], config: PAConfig
) -> None:
    """A low token takes the next free slot, or the least used one."""
    slots, clock = arena.usage.shape[1], arena.clock[rows]
    place = replacement_key(arena.usage[rows], arena.stamp[rows], clock, config).argmin(-1)
    replace(arena.slots, _target(mask, rows * slots + place, arena), *new, clock)
    arena.filled.index_add_(0, rows, (mask & (filled < slots)).long())
    arena.counters.view(-1).index_add_(0, rows * arena.counters.shape[1] + REPLACEMENTS, mask.long())


def _target(mask: Tensor, place: Tensor, arena: BankState) -> Tensor:
    """Places in the flat arena, those that are masked in its last row."""
    rows, slots = arena.usage.shape
    return torch.where(mask, place, (rows - 1) * slots)
