"""Decoded rows of a gated FFN by their working sets, in Triton: what no row of a tile chose is not read.

Two kernels and a sum: inner activations of the chosen experts, zero elsewhere; then the down-projection from the chosen
experts, in parts of a fixed number of experts, each in the experts' order. An expert that a row did not choose adds an
exact zero to it whether it is skipped or not, and a tile's products have one shape in one program for any number of
rows, so a row's bits do not depend on the other rows. Sets are read from a table by row; nothing waits for the device.

A candidate: right on a GPU, its speed there not measured; it stays until it is.
Only imported where Triton is there; under ``TRITON_INTERPRET=1`` it runs on a CPU.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from pacellm.experts.gated import Weights

_ROWS = 16  # rows of a tile
_NEURONS = 32  # of gate and up that one program works out
_COLUMNS = 64  # outputs of one program
_WIDTH = 128  # of the longest product
_PARTS = 8  # that the experts are divided into for the down-projection
_MOST = 512  # rows at once, where a log is replayed: their parts of the down-projection take memory
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its products know no bfloat16
_OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def products(hidden: Tensor, weights: Weights, table: Tensor, rows: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Inner activations [B, F], zero outside of each row's set, and outputs [B, H], the bias included.

    Args:
        hidden: [B, H].
        table: [R, E] bool, sets of experts; E divides F.
        rows: [B] int64, the row of the table that each row uses.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
    """
    hidden = hidden.contiguous()
    x, output = hidden.new_empty(len(hidden), len(weights.gate)), torch.empty_like(hidden)
    for start in range(0, len(hidden), _MOST):
        part = slice(start, start + _MOST)
        _launch(hidden[part], weights, table.view(torch.uint8), rows[part], activation, x[part], output[part])
    return x, output


def _launch(
    hidden: Tensor, weights: Weights, sets: Tensor, rows: Tensor, activation: str, x: Tensor, output: Tensor
) -> None:
    batch, size = hidden.shape
    experts = sets.shape[1]
    each = x.shape[1] // experts
    operand = _OPERANDS[torch.float32 if _IS_INTERPRETED else hidden.dtype]
    tiles = triton.cdiv(batch, _ROWS)
    _activate[(tiles, triton.cdiv(each, _NEURONS), experts)](
        hidden, weights.gate, weights.up, weights.gate_bias, weights.up_bias, sets, rows, x, batch,
        EXPERTS=experts, SIZE=each, HIDDEN=size, ACTIVATION=activation, OPERAND=operand,
        ROWS=_ROWS, NEURONS=_NEURONS, WIDTH=_width(size),
    )  # fmt: skip
    share = triton.cdiv(experts, _PARTS)
    parts = triton.cdiv(experts, share)
    sums = torch.empty(parts, batch, size, dtype=torch.float32, device=hidden.device)
    columns = triton.cdiv(size, _COLUMNS)
    _project[(tiles, columns, parts)](
        x, weights.down, sets, rows, sums, batch, weights.down.stride(0), weights.down.stride(1),
        EXPERTS=experts, SIZE=each, HIDDEN=size, SHARE=share, OPERAND=operand,
        ROWS=_ROWS, COLUMNS=_COLUMNS, WIDTH=_width(each),
    )  # fmt: skip
    _sum[(batch, columns)](sums, weights.down_bias, output, batch, PARTS=parts, HIDDEN=size, COLUMNS=_COLUMNS)


def _width(size: int) -> int:
    return max(16, min(_WIDTH, triton.next_power_of_2(size)))


@triton.jit(do_not_specialize=["batch"])
def _activate(
    hidden_at, gate_at, up_at, gate_bias_at, up_bias_at, sets_at, rows_at, inner_at, batch,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """act(gate) * up of ``NEURONS`` neurons of one expert for a tile of rows."""
    tile, part, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < batch
    own = tl.load(rows_at + row, mask=inside, other=0)
    chosen = tl.load(sets_at + own * EXPERTS + expert, mask=inside, other=0) != 0
    neuron = part * NEURONS + tl.arange(0, NEURONS)
    exists = neuron < SIZE
    place = expert * SIZE + neuron
    x = tl.zeros([ROWS, NEURONS], tl.float32)
    if tl.max(chosen.to(tl.int32), 0) > 0:
        gate, up = tl.zeros([ROWS, NEURONS], tl.float32), tl.zeros([ROWS, NEURONS], tl.float32)
        weight = place.to(tl.int64)[:, None] * HIDDEN
        for start in range(0, HIDDEN, WIDTH):
            column = start + tl.arange(0, WIDTH)
            real = column < HIDDEN
            hidden = tl.load(
                hidden_at + row[:, None] * HIDDEN + column[None, :], mask=inside[:, None] & real[None, :], other=0.0
            ).to(OPERAND)
            mask = exists[:, None] & real[None, :]
            gates = tl.load(gate_at + weight + column[None, :], mask=mask, other=0.0).to(OPERAND)
            gate = tl.dot(hidden, tl.trans(gates), gate, input_precision="ieee")
            ups = tl.load(up_at + weight + column[None, :], mask=mask, other=0.0).to(OPERAND)
            up = tl.dot(hidden, tl.trans(ups), up, input_precision="ieee")
        if gate_bias_at is not None:
            gate += tl.load(gate_bias_at + place, mask=exists, other=0.0).to(tl.float32)[None, :]
        if up_bias_at is not None:
            up += tl.load(up_bias_at + place, mask=exists, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "silu":
            gate = gate * tl.sigmoid(gate)
        elif ACTIVATION == "gelu":
            gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        else:  # half of 1 + tanh(z) is the sigmoid of 2 z
            gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        x = tl.where(chosen[:, None], gate * up, 0.0)
    tl.store(
        inner_at + row[:, None] * (EXPERTS * SIZE) + place[None, :], x.to(inner_at.dtype.element_ty),
        mask=inside[:, None] & exists[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _project(
    inner_at, down_at, sets_at, rows_at, sums_at, batch, down_column, down_neuron,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, HIDDEN: tl.constexpr, SHARE: tl.constexpr,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What ``SHARE`` experts add to ``COLUMNS`` outputs of a tile of rows."""
    tile, part, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < batch
    own = tl.load(rows_at + row, mask=inside, other=0)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    real = column < HIDDEN
    weight = column.to(tl.int64)[:, None] * down_column
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for expert in range(share * SHARE, tl.minimum(share * SHARE + SHARE, EXPERTS)):
        chosen = tl.load(sets_at + own * EXPERTS + expert, mask=inside, other=0)
        if tl.max(chosen.to(tl.int32), 0) > 0:
            for start in range(0, SIZE, WIDTH):
                neuron = start + tl.arange(0, WIDTH)
                exists = neuron < SIZE
                place = expert * SIZE + neuron
                x = tl.load(
                    inner_at + row[:, None] * (EXPERTS * SIZE) + place[None, :],
                    mask=inside[:, None] & exists[None, :], other=0.0,
                ).to(OPERAND)  # fmt: skip
                downs = tl.load(
                    down_at + weight + place[None, :].to(tl.int64) * down_neuron,
                    mask=real[:, None] & exists[None, :], other=0.0,
                ).to(OPERAND)  # fmt: skip
                found = tl.dot(x, tl.trans(downs), found, input_precision="ieee")
    target = (share * batch + row[:, None]) * HIDDEN + column[None, :]
    tl.store(sums_at + target, found, mask=inside[:, None] & real[None, :])


@triton.jit(do_not_specialize=["batch"])
def _sum(
    sums_at, bias_at, output_at, batch, PARTS: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The parts of ``COLUMNS`` outputs of one row, in order, and the bias."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < HIDDEN
    total = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums_at + (part * batch + row) * HIDDEN + column, mask=real, other=0.0)
    if bias_at is not None:
        total += tl.load(bias_at + column, mask=real, other=0.0).to(tl.float32)
    tl.store(output_at + row * HIDDEN + column, total.to(output_at.dtype.element_ty), mask=real)
