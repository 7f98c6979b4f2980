"""Attention of a prompt's chunk by every kernel that is there, beside the matrix limit."""

from __future__ import annotations

from typing import Any

import torch

from load_tests.gpu.rig import Rig
from pacellm.model.attention import choice as kernel_choice
from pacellm.model.attention import prefill as prefill_kernels
from pacellm.model.attention.plan import PrefillKernel

Cells = dict[str, Any]


@torch.inference_mode()
def kernels(rig: Rig, limits: Cells) -> Cells:
    """One layer's attention of 2K queries behind 2K, 32K and 200K keys; ``error`` is the largest beside a plain
    computation, and a kernel that cannot be used has ``why_not`` in place of times."""
    queries, depths = (128, (128, 200)) if rig.small else (2048, (2048, 32_768, 200_000))
    cells: Cells = {"queries": queries}
    for name in kernel_choice.NAMES:
        try:
            cells[name] = _measured(rig, limits, prefill_kernels.load(name), queries, depths)
        except Exception as problem:
            cells[name] = {"why_not": kernel_choice.reason(problem)}
        rig.collect()
    return cells


def _measured(rig: Rig, limits: Cells, kernel: PrefillKernel, queries: int, depths: tuple[int, ...]) -> Cells:
    model = rig.model
    heads, kv_shape = shape = model.query_heads[0], model.kv_shapes[0]
    cell: Cells = {"error": kernel_choice.error(kernel, shape, model.dtype, model.device)}
    for depth in depths:
        seconds = kernel_choice.seconds_of(kernel, shape, model.dtype, model.device, queries=queries, behind=depth)
        flops = 4.0 * heads * kv_shape[0][1] * queries * (depth + (queries + 1) / 2)
        floor = flops / limits["matrix_flops"]
        cell[str(depth)] = {"seconds": seconds, "floor_seconds": floor, "of_limit": floor / seconds}
    return cell
