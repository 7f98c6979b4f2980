"""What a decoder layer does between its matrix products, a kernel each: norms, rotary positions, the gated activation,
and the merging of parts of attention. ``fused.py`` puts them in place.

Sums of a row are taken by one program in one order, so a row does not depend on how many others there are.
Only imported where Triton is there; under ``TRITON_INTERPRET=1`` it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # of one program of the gated activation


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, *, plus_one: bool) -> Tensor:
    """[..., D] over the root mean square of its last dimension (Zhang & Sennrich 2019), times ``weight`` [D].

    Args:
        plus_one: times 1 + weight, all in float32, as Gemma has it; else the quotient is rounded before its product.
    """
    size = hidden.shape[-1]
    # [tokens, heads, D]: a token's heads may be a part of a longer row
    rows = hidden.view(-1, 1, size) if hidden.is_contiguous() else hidden.flatten(0, -3)
    output = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    block = triton.next_power_of_2(size)
    _rms_norm[(rows.shape[0], rows.shape[1])](
        rows, weight, output, rows.stride(0), rows.stride(1), size, epsilon, PLUS_ONE=plus_one, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return output


@triton.jit
def _rms_norm(
    x_at, weight_at, output_at, outer_stride, inner_stride, size, epsilon, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    outer, inner = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    given = tl.load(x_at + outer * outer_stride + inner * inner_stride + column, mask=inside, other=0.0)
    x = given.to(tl.float32)
    weight = tl.load(weight_at + column, mask=inside, other=0.0)
    quotient = x * tl.rsqrt(tl.sum(x * x, 0) / size + epsilon)
    if PLUS_ONE:
        found = quotient * (1.0 + weight.to(tl.float32))
    else:
        found = quotient.to(given.dtype).to(tl.float32) * weight.to(tl.float32)
    place = (outer * tl.num_programs(1) + inner) * size
    tl.store(output_at + place + column, found.to(given.dtype), mask=inside)


def gated(both: Tensor, activation: str) -> Tensor:
    """act(gate) * up, [T, F] from [T, 2 F] that holds the gates, then the ups; ``activation`` as
    :func:`pacellm.experts.gated.activation_name` has it."""
    rows, size = both.shape[0], both.shape[1] // 2
    output = both.new_empty(rows, size)
    _gated[(rows, triton.cdiv(size, _COLUMNS))](
        both, output, both.stride(0), size, ACTIVATION=activation, COLUMNS=_COLUMNS
    )
    return output


@triton.jit
def _sigmoid(x):
    """Without an overflow on the way, whatever x is."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _gated(both_at, output_at, stride, size, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    given = tl.load(both_at + row * stride + column, mask=inside, other=0.0)
    up = tl.load(both_at + row * stride + size + column, mask=inside, other=0.0).to(tl.float32)
    gate = given.to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate * _sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # half of 1 + tanh(z) is the sigmoid of 2 z
        gate = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    found = gate.to(given.dtype).to(tl.float32) * up
    tl.store(output_at + row * size + column, found.to(given.dtype), mask=inside)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of each head turned against each other (Su et al. 2021, in GPT-NeoX's order).

    Args:
        query: [1, H, T, D]. key: [1, Hkv, T, D]. cos, sin: [1, T, D].

    Returns:
        The same shapes, token by token in memory.
    """
    (_, heads, count, size), kv_heads = query.shape, key.shape[1]
    turned = query.new_empty(count, heads + kv_heads, size)
    cos, sin = cos.expand(1, count, size), sin.expand(1, count, size)
    _rotary[(count, heads + kv_heads)](
        query, key, cos, sin, turned, heads, query.stride(1), query.stride(2), key.stride(1), key.stride(2),
        cos.stride(1), sin.stride(1), HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip
    whole = turned.transpose(0, 1)[None]
    return whole[:, :heads], whole[:, heads:]


@triton.jit
def _rotary(
    query_at, key_at, cos_at, sin_at, output_at, heads, query_head, query_row, key_head, key_row, cos_row, sin_row,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    if head < heads:
        source = query_at + row * query_row + head.to(tl.int64) * query_head
    else:
        source = key_at + row * key_row + (head - heads).to(tl.int64) * key_head
    given = tl.load(source + column, mask=inside, other=0.0)
    first, second = given.to(tl.float32), tl.load(source + HALF + column, mask=inside, other=0.0).to(tl.float32)
    cos_at += row * cos_row + column
    sin_at += row * sin_row + column
    low = first * tl.load(cos_at, mask=inside, other=0.0) - second * tl.load(sin_at, mask=inside, other=0.0)
    high = second * tl.load(cos_at + HALF, mask=inside, other=0.0)
    high += first * tl.load(sin_at + HALF, mask=inside, other=0.0)
    target = output_at + (row * tl.num_programs(1) + head) * (2 * HALF) + column
    tl.store(target, low.to(given.dtype), mask=inside)
    tl.store(target + HALF, high.to(given.dtype), mask=inside)


def store(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Put one token of each of B sequences into the slab.

    Args:
        keys, values: [Hkv, slots, D], [Hkv, slots, Dv]. slots: [B] int64. key, value: [Hkv, B, D], [Hkv, B, Dv].
    """
    for slab, new in ((keys, key), (values, value)):
        assert slab.stride(2) == new.stride(2) == 1
    size, width = key.shape[2], value.shape[2]
    _store[(len(slots), key.shape[0])](
        keys, values, slots, key, value, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), size, width,
        BLOCK=triton.next_power_of_2(max(size, width)), num_warps=1,
    )  # fmt: skip


@triton.jit
def _store(
    keys_at, values_at, slots_at, key_at, value_at, keys_head, keys_slot, values_head, values_slot,
    key_head, key_row, value_head, value_row, size, width, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot, column = tl.load(slots_at + row), tl.arange(0, BLOCK)
    key = tl.load(key_at + head * key_head + row * key_row + column, mask=column < size)
    value = tl.load(value_at + head * value_head + row * value_row + column, mask=column < width)
    tl.store(keys_at + head * keys_head + slot * keys_slot + column, key, mask=column < size)
    tl.store(values_at + head * values_head + slot * values_slot + column, value, mask=column < width)


def merge_copies(parts: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pacellm.model.attention.prefill.merge_copies`, in one pass."""
    copies, count, heads, size = parts.shape
    merged = torch.empty(count, heads, size, dtype=torch.float32, device=parts.device)
    total = torch.empty(count, heads, dtype=torch.float32, device=parts.device)
    _merge_copies[(count, heads)](
        parts, lse, merged, total, copies, parts.stride(0), parts.stride(1), parts.stride(2), *lse.stride(), size,
        COPIES=triton.next_power_of_2(copies), BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return merged, total


@triton.jit
def _merge_copies(
    parts_at, lse_at, merged_at, total_at, copies, part_copy, part_row, part_head, lse_copy, lse_row, lse_head, size,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    copy, column = tl.arange(0, COPIES).to(tl.int64), tl.arange(0, BLOCK)
    inside = (copy < copies)[:, None] & (column < size)[None, :]
    lse = tl.load(lse_at + copy * lse_copy + row * lse_row + head * lse_head, mask=copy < copies, other=float("-inf"))
    highest = tl.max(lse, 0)
    weights = tl.exp(lse - highest)
    total = tl.sum(weights, 0)
    place = parts_at + copy[:, None] * part_copy + row * part_row + head * part_head + column[None, :]
    parts = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    target = row * tl.num_programs(1) + head
    tl.store(merged_at + target * size + column, tl.sum(parts * weights[:, None], 0) / total, mask=column < size)
    tl.store(total_at + target, highest + tl.log(total))


def merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pacellm.model.attention.prefill.merge`: [n, H, D] as float32 and [n, H], in one pass."""
    count, heads, size = total.shape
    merged = torch.empty(count, heads, size, dtype=torch.float32, device=total.device)
    both = torch.empty(count, heads, dtype=torch.float32, device=total.device)
    _merge[(count, heads)](
        total, lse, part, part_lse, merged, both, total.stride(0), total.stride(1), lse.stride(0), lse.stride(1),
        part.stride(0), part.stride(1), part_lse.stride(0), part_lse.stride(1), size,
        BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return merged, both


@triton.jit
def _merge(
    total_at, lse_at, part_at, part_lse_at, merged_at, both_at, total_row, total_head, lse_row, lse_head,
    part_row, part_head, part_lse_row, part_lse_head, size, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    one = tl.load(lse_at + row * lse_row + head * lse_head)
    other = tl.load(part_lse_at + row * part_lse_row + head * part_lse_head)
    highest = tl.maximum(one, other)
    both = highest + tl.log(tl.exp(one - highest) + tl.exp(other - highest))
    total = tl.load(total_at + row * total_row + head * total_head + column, mask=inside, other=0.0).to(tl.float32)
    part = tl.load(part_at + row * part_row + head * part_head + column, mask=inside, other=0.0).to(tl.float32)
    place = row * tl.num_programs(1) + head
    merged = total * tl.exp(one - both) + part * tl.exp(other - both)
    tl.store(merged_at + place * size + column, merged, mask=inside)
    tl.store(both_at + place, both)
