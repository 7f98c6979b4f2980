"""``decode_device.py`` in four Triton kernels a layer: similarities, verdicts, recall, writes.

The torch form gathers every sequence's bank before it is multiplied (at batch 64 and Qwen2.5-7B's sizes 242 MB of keys
a layer, read, written and read again) and takes some eighty small kernels. Here banks are read where they lie, once.
Sums run over fixed blocks, so a token's result does not depend on how many others there are.

Only imported where Triton is there; under ``TRITON_INTERPRET=1`` it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.state import BankState
from pacellm.memory.tokens import OBSERVE, PAPER, DecodedTokens, rules

_SPLIT = 2048  # inner activations that one program multiplies
_SLOTS = 32  # keys of one program
_WIDTH = 128  # columns of one program


def feed(
    arena: BankState, tokens: DecodedTokens, x: Tensor, y: Tensor, config: PAConfig, sets: Tensor | None = None
) -> Tensor:
    """As :func:`pacellm.memory.decode_device.feed`, equal up to rounding; where neither the answer nor the bank needs a
    token's output, it is the plain one."""
    batch, inner = x.shape
    slots, hidden = arena.values.shape[1:]
    top, bottom = min(config.top_k, slots), min(config.bottom_k, slots)
    splits = triton.cdiv(inner, _SPLIT)
    dots, squares = (x.new_empty(splits, batch, slots, dtype=torch.float32) for _ in range(2))
    lengths = x.new_empty(splits, batch, dtype=torch.float32)
    x, y = x.contiguous(), y.contiguous()
    own = None if sets is None or tokens.sets is None else sets.view(torch.uint8)
    experts = 1 if own is None else own.shape[1]
    table = rules(config, x.device)
    numbers = table.shape[1]
    _similar[(batch, triton.cdiv(slots, _SLOTS), splits)](
        x, arena.keys, tokens.rows, own, tokens.sets, dots, squares, lengths, batch, slots, inner,
        EXPERTS=experts, SIZE=inner // experts, SPLIT=_SPLIT, SLOTS=_SLOTS, WIDTH=_WIDTH,
    )  # fmt: skip
    weights = x.new_empty(batch, slots, dtype=torch.float32)
    chosen = torch.empty(batch, top, dtype=torch.int64, device=x.device)
    verdict = torch.empty(batch, 3, dtype=torch.int64, device=x.device)  # outcome, action, slot
    _judge[(batch,)](
        dots, squares, lengths, tokens.rows, tokens.live, tokens.writes, tokens.presets, table,
        arena.filled, arena.usage, arena.stamp, arena.clock, arena.counters, weights, chosen, verdict,
        batch, slots, splits, config.negative_weight, config.fuse_weight,
        TOP=top, BOTTOM=bottom, OBSERVE=OBSERVE, PAPER=PAPER, NUMBERS=numbers, AGE=config.ties == "age",
        KINDS=arena.counters.shape[1], SLOTS=triton.next_power_of_2(slots),
    )  # fmt: skip
    output = torch.empty_like(y)
    columns = triton.cdiv(hidden, _WIDTH)
    _recall[(batch, columns)](
        arena.values, tokens.rows, tokens.presets, table, weights, verdict, y, output, slots, hidden,
        config.fuse_weight, PAPER=PAPER, NUMBERS=numbers, SLOTS=_SLOTS, WIDTH=_WIDTH,
    )  # fmt: skip
    for stored, new in ((arena.keys, x), (arena.values, output)):
        width = stored.shape[2]
        _write[(batch, triton.cdiv(width, 4 * _WIDTH))](
            stored, new, tokens.rows, chosen, verdict, slots, width, config.momentum, TOP=top, WIDTH=4 * _WIDTH
        )
    return output


@triton.jit
def _similar(
    x_at, keys_at, rows_at, sets_at, set_rows_at, dots_at, squares_at, lengths_at, batch, slots, inner,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, SPLIT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Products of one token with ``SLOTS`` keys, the keys' squares and the token's, over ``SPLIT`` activations.

    With sets only over the neurons of the token's own set, outside of which x is zero.
    """
    token, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = part * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(rows_at + token)
    set_row = 0
    if set_rows_at is not None:
        set_row = tl.load(set_rows_at + token)
    keys_at += (row * slots + slot[:, None]) * inner
    dots, squares = tl.zeros([SLOTS], tl.float32), tl.zeros([SLOTS], tl.float32)
    length = tl.zeros([1], tl.float32)
    for start in range(split * SPLIT, (split + 1) * SPLIT, WIDTH):
        column = start + tl.arange(0, WIDTH)
        x = tl.load(x_at + token * inner + column, mask=column < inner, other=0.0).to(tl.float32)
        inside = (slot[:, None] < slots) & (column[None, :] < inner)
        if sets_at is not None:
            chosen = tl.load(sets_at + set_row * EXPERTS + column // SIZE, mask=column < inner, other=0)
            inside = inside & (chosen != 0)[None, :]
        keys = tl.load(keys_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dots += tl.sum(keys * x[None, :], 1)
        squares += tl.sum(keys * keys, 1)
        length += tl.sum(x * x, 0)
    place = (split * batch + token) * slots + slot
    tl.store(dots_at + place, dots, mask=slot < slots)
    tl.store(squares_at + place, squares, mask=slot < slots)
    tl.store(lengths_at + split * batch + token + tl.arange(0, 1), length, mask=part + tl.arange(0, 1) == 0)


@triton.jit
def _judge(
    dots_at, squares_at, lengths_at, rows_at, live_at, writes_at, presets_at, rules_at,
    filled_at, usage_at, stamp_at, clock_at, counters_at, weights_at, chosen_at, verdict_at,
    batch, slots, splits, negative_weight, fuse_weight,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, OBSERVE: tl.constexpr, PAPER: tl.constexpr, NUMBERS: tl.constexpr,
    AGE: tl.constexpr, KINDS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What one token's similarities mean: weights of the recall, and all of the write that is bookkeeping."""
    token = tl.program_id(0)
    preset = tl.load(presets_at + token)
    high = tl.load(rules_at + preset * NUMBERS).to(tl.float32)
    low = tl.load(rules_at + preset * NUMBERS + 1).to(tl.float32)
    slot = tl.arange(0, SLOTS)
    inside = slot < slots
    row = tl.load(rows_at + token)
    live = tl.load(live_at + token).to(tl.int1)
    writes = live & tl.load(writes_at + token).to(tl.int1)
    filled = tl.load(filled_at + row)
    dots, squares = tl.zeros([SLOTS], tl.float32), tl.zeros([SLOTS], tl.float32)
    length = 0.0
    for split in range(splits):
        place = (split * batch + token) * slots + slot
        dots += tl.load(dots_at + place, mask=inside, other=0.0)
        squares += tl.load(squares_at + place, mask=inside, other=0.0)
        length += tl.load(lengths_at + split * batch + token)
    cosine = dots / tl.maximum(tl.sqrt(length) * tl.sqrt(squares), 1e-12)
    exists = slot < filled

    best = tl.where(exists, cosine, float("-inf"))
    sigma = tl.max(best, 0)
    count, total = 0.0, 0.0
    positive = tl.zeros([SLOTS], tl.int32)
    for rank in tl.static_range(TOP):
        value, place = tl.max(best, 0), tl.argmax(best, 0)
        used = rank < filled
        total += tl.where(used, value, 0.0)
        count += tl.where(used, 1.0, 0.0)
        positive = tl.where((slot == place) & used, 1, positive)
        tl.store(chosen_at + token * TOP + rank, tl.where(used, place, -1).to(tl.int64))
        best = tl.where(slot == place, float("-inf"), best)
    mean = total / tl.maximum(count, 1.0)
    worst = tl.where(exists, cosine, float("inf"))
    negative, fewest = tl.zeros([SLOTS], tl.float32), 0.0
    for rank in tl.static_range(BOTTOM):
        place = tl.argmin(worst, 0)
        used = rank < filled
        fewest += tl.where(used, 1.0, 0.0)
        negative = tl.where((slot == place) & used, 1.0, negative)
        worst = tl.where(slot == place, float("inf"), worst)

    empty = filled == 0
    hit = (filled > 0) & (sigma > high)
    fuse = (filled > 0) & (sigma > low) & (sigma <= high)
    share = tl.where(hit, 1.0, tl.where(fuse, fuse_weight, 0.0))
    again = tl.where(hit | fuse, negative_weight, 0.0) / tl.maximum(fewest, 1.0)
    weights = positive.to(tl.float32) * (share / tl.maximum(count, 1.0)) + negative * again
    tl.store(weights_at + token * slots + slot, weights, mask=inside)

    is_low = empty | (mean <= low)
    is_high = (filled > 0) & (mean > high)
    is_mid = (filled > 0) & (mean > low) & (mean <= high)
    merges, replaces = writes & is_mid, writes & is_low
    clock = tl.load(clock_at + row) + writes.to(tl.int64)
    tl.store(clock_at + row, clock)
    usage = tl.load(usage_at + row * slots + slot, mask=inside, other=9223372036854775807)
    stamp = tl.load(stamp_at + row * slots + slot, mask=inside, other=9223372036854775807)
    counted = merges | (writes & is_high & (preset == PAPER))
    usage = tl.where((positive > 0) & counted, usage + 1, usage)
    stamp = tl.where((positive > 0) & merges, clock, stamp)
    if AGE:
        age = tl.where(usage == tl.min(usage, 0), stamp, 9223372036854775807)
        target = tl.argmin(age, 0).to(tl.int64)
    else:
        target = tl.argmin(usage, 0).to(tl.int64)
    usage = tl.where((slot == target) & replaces, 1, usage)
    stamp = tl.where((slot == target) & replaces, clock, stamp)
    tl.store(usage_at + row * slots + slot, usage, mask=inside)
    tl.store(stamp_at + row * slots + slot, stamp, mask=inside)
    tl.store(filled_at + row, filled + (replaces & (filled < slots)).to(tl.int64))

    counters_at += row * KINDS
    code = tl.where(empty, 3, tl.where(hit, 0, tl.where(fuse, 1, 2)))
    tl.store(counters_at + code, tl.load(counters_at + code) + live.to(tl.int64))
    merged = tl.where(merges, count, 0.0).to(tl.int64)
    tl.store(counters_at + 4, tl.load(counters_at + 4) + merged)
    tl.store(counters_at + 5, tl.load(counters_at + 5) + replaces.to(tl.int64))
    is_read = (hit | fuse) & ((preset != OBSERVE) | merges | replaces)
    tl.store(verdict_at + token * 3, tl.where(is_read, tl.where(hit, 1, 2), 0).to(tl.int64))
    tl.store(verdict_at + token * 3 + 1, tl.where(replaces, 2, tl.where(merges, 1, 0)).to(tl.int64))
    tl.store(verdict_at + token * 3 + 2, target)


@triton.jit
def _recall(
    values_at, rows_at, presets_at, rules_at, weights_at, verdict_at, y_at, output_at, slots, hidden, fuse_weight,
    PAPER: tl.constexpr, NUMBERS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` columns of one token's output."""
    token, part = tl.program_id(0), tl.program_id(1)
    column = part * WIDTH + tl.arange(0, WIDTH)
    row, outcome = tl.load(rows_at + token), tl.load(verdict_at + token * 3)
    y = tl.load(y_at + token * hidden + column, mask=column < hidden, other=0.0)
    output = y.to(tl.float32)
    if outcome > 0:
        recalled = tl.zeros([WIDTH], tl.float32)
        for start in range(0, slots, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            weights = tl.load(weights_at + token * slots + slot, mask=slot < slots, other=0.0)
            inside = (slot[:, None] < slots) & (column[None, :] < hidden)
            place = (row * slots + slot[:, None]) * hidden + column[None, :]
            values = tl.load(values_at + place, mask=inside, other=0.0).to(tl.float32)
            recalled += tl.sum(weights[:, None] * values, 0)
        preset = tl.load(presets_at + token)
        mix = tl.load(rules_at + preset * NUMBERS + 2).to(tl.float32)
        rest = tl.load(rules_at + preset * NUMBERS + 3).to(tl.float32)
        fuses = (outcome == 2) & (preset == PAPER)
        recalled = tl.where(fuses, recalled + (1.0 - fuse_weight) * output, recalled)
        output = rest * output + mix * recalled
    tl.store(output_at + token * hidden + column, output.to(y.dtype), mask=column < hidden)


@triton.jit
def _write(
    stored_at, new_at, rows_at, chosen_at, verdict_at, slots, width, momentum,
    TOP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` columns of what one token changes in keys or values."""
    token, part = tl.program_id(0), tl.program_id(1)
    action = tl.load(verdict_at + token * 3 + 1)
    if action > 0:
        column = part * WIDTH + tl.arange(0, WIDTH)
        inside = column < width
        new = tl.load(new_at + token * width + column, mask=inside, other=0.0)
        stored_at += tl.load(rows_at + token) * slots * width
        if action == 2:
            target = tl.load(verdict_at + token * 3 + 2)
            tl.store(stored_at + target * width + column, new, mask=inside)
        else:
            for rank in tl.static_range(TOP):
                slot = tl.load(chosen_at + token * TOP + rank)
                mask = column < tl.where(slot >= 0, width, 0)
                slot = tl.maximum(slot, 0)
                old = tl.load(stored_at + slot * width + column, mask=mask, other=0.0)
                merged = momentum * old.to(tl.float32) + (1.0 - momentum) * new.to(tl.float32)
                tl.store(stored_at + slot * width + column, merged.to(old.dtype), mask=mask)
