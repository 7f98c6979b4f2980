"""Attention of decoded tokens on CUDA: one Triton kernel over the slab where it lies, split along the keys.

Where a sequence's keys lie is told by a table of its blocks, so any number of runs costs the same, and lengths and
tables are tensors: a captured step serves every length. Positions are cut at the same places whatever runs they lie in.
Where several sequences share the beginning of one document, its keys are read once for all their queries
(:class:`Shared`), and both parts are merged by log-sum-exp.

Only imported where Triton is there; under ``TRITON_INTERPRET=1`` it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacellm.model.context import DecodeRows

_KEYS = 64  # keys of one product
_PROGRAMS = 264  # two for each multiprocessor of an H100


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: DecodeRows,
    scale: float,
    window: int | None,
    splits: int | None = None,
) -> Tensor:
    """[H, B, D] queries of one token each -> [B, H, Dv].

    Args:
        keys, values: [Hkv, slots, D], [Hkv, slots, Dv].
        rows: where each sequence's keys lie and how many there are, its own included.
        window: a token sees that many, itself included; None: all. Shared parts are not used then.
        splits: into how many parts each sequence's keys are cut; None: as many as fill the device.
    """
    heads, batch, _ = query.shape
    kv_heads, width = keys.shape[0], values.shape[2]
    splits = splits or max(1, min(64, triton.next_power_of_2(_PROGRAMS // (batch * kv_heads) or 1)))
    shared = rows.shared if window is None else None
    parts = splits if shared is None else 2 * splits
    output = query.new_empty(batch, heads, parts, width, dtype=torch.float32)
    lse = query.new_empty(batch, heads, parts, dtype=torch.float32)
    first = None
    if shared is not None:
        lse.fill_(-torch.inf)  # of sequences that share nothing
        first = shared.lengths[shared.group]  # what lies before belongs to the shared part
    arguments = (query, keys, values, output, lse, scale, window or 0, rows.tables)
    _launch(*arguments, None, None, first, rows.lengths, 0, splits)
    if shared is not None:
        _launch(*arguments, shared.members, shared.leader, None, shared.lengths, splits, splits)
    merged = query.new_empty(batch, heads, width)
    _merge[(batch, heads)](
        output, lse, merged, parts, width, PARTS=triton.next_power_of_2(parts), WIDTH=triton.next_power_of_2(width)
    )
    return merged


def _launch(
    query: Tensor, keys: Tensor, values: Tensor, output: Tensor, lse: Tensor, scale: float, window: int,
    tables: Tensor, members: Tensor | None, leader: Tensor | None, first: Tensor | None, last: Tensor, offset: int,
    splits: int,
) -> None:  # fmt: skip
    """Keys ``first`` (None: 0, or where the window begins) to ``last`` of each item. Its queries are ``members``, its
    table is that of ``leader``; None: item i is sequence i."""
    items, queries = len(last), 1 if members is None else members.shape[1]
    heads, _, size = query.shape
    kv_heads, width = keys.shape[0], values.shape[2]
    group = heads // kv_heads
    _partial[(items, kv_heads, splits)](
        query, keys, values, tables, members, leader, first, last, output, lse, scale, window,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        tables.stride(0), heads, lse.shape[2], offset, splits, size, width,
        GROUP=group, QUERIES=queries, ROWS=max(16, triton.next_power_of_2(queries * group)),
        SIZE=max(16, triton.next_power_of_2(size)), WIDTH=max(16, triton.next_power_of_2(width)), KEYS=_KEYS,
        BLOCK=DecodeRows.BLOCK,
    )  # fmt: skip


@triton.jit
def _partial(
    query_at, keys_at, values_at, tables_at, members_at, leader_at, first_at, last_at, output_at, lse_at, scale, window,
    query_head, query_row, keys_head, keys_slot, values_head, values_slot, table_row, heads, parts, offset, splits,
    size, width,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one item (one sequence's own, or a shared beginning), all queries of a KV head."""
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(last_at + item)
    first = last * 0
    if first_at is not None:
        first = tl.load(first_at + item)
    elif window > 0:
        first = tl.maximum(last - window, 0)
    each = tl.cdiv(tl.cdiv(last - first, splits), KEYS) * KEYS
    start = first + split * each
    stop = tl.minimum(start + each, last)
    row = tl.arange(0, ROWS)
    member = row // GROUP
    if members_at is None:
        sequence = tl.where(member == 0, item, -1).to(tl.int64)
    else:
        sequence = tl.load(members_at + item * QUERIES + member, mask=member < QUERIES, other=-1).to(tl.int64)
    is_real = sequence >= 0
    sequence = tl.maximum(sequence, 0)
    head = kv_head * GROUP + row % GROUP
    column, out_column = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    query = tl.load(
        query_at + head[:, None] * query_head + sequence[:, None] * query_row + column[None, :],
        mask=is_real[:, None] & (column[None, :] < size), other=0.0,
    )  # fmt: skip
    if leader_at is None:
        tables_at += item * table_row
    else:
        tables_at += tl.load(leader_at + item) * table_row
    keys_at += kv_head.to(tl.int64) * keys_head
    values_at += kv_head.to(tl.int64) * values_head
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(start, stop, KEYS):
        position = at + tl.arange(0, KEYS)
        inside = position < stop
        slot = tl.load(tables_at + position // BLOCK, mask=inside, other=0).to(tl.int64) + position % BLOCK
        keys = tl.load(
            keys_at + slot[:, None] * keys_slot + column[None, :],
            mask=inside[:, None] & (column[None, :] < size), other=0.0,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(keys)) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(highest - higher)
        values = tl.load(
            values_at + slot[:, None] * values_slot + out_column[None, :],
            mask=inside[:, None] & (out_column[None, :] < width), other=0.0,
        )  # fmt: skip
        total = total * fade + tl.sum(weights, 1)
        found = found * fade[:, None] + tl.dot(weights.to(values.dtype), values)
        highest = higher
    place = (sequence * heads + head) * parts + offset + split
    if stop > start:
        found = found / total[:, None]
        mask = is_real[:, None] & (out_column[None, :] < width)
        tl.store(output_at + place[:, None] * width + out_column[None, :], found, mask=mask)
        tl.store(lse_at + place, highest + tl.log(total), mask=is_real)
    else:
        tl.store(lse_at + place, highest, mask=is_real)  # no keys: log of nothing


@triton.jit
def _merge(output_at, lse_at, merged_at, parts, width, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """One query's parts into one, by log-sum-exp; parts without keys count nothing."""
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    part, column = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    lse = tl.load(lse_at + place * parts + part, mask=part < parts, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, 0))
    inside = (lse > float("-inf"))[:, None] & (column[None, :] < width)
    found = tl.load(output_at + (place * parts + part[:, None]) * width + column[None, :], mask=inside, other=0.0)
    merged = tl.sum(found * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(merged_at + place * width + column, merged.to(merged_at.dtype.element_ty), mask=column < width)
