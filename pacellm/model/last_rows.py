"""The last layer's FFN, for the rows that somebody reads.

Behind the last layer's attention every row stands for itself, so of a prompt's chunk only the rows that the head reads
need an FFN there, unless that layer has a bank or its experts are counted (see also :meth:`StepContext.first_row`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pacellm.model.context import Chunk, StepContext, current_step
from pacellm.rows import missing_rows

_KEY = "last rows"


def keep_last_rows(ffn: nn.Module, layer: int) -> None:
    """Have the last layer's FFN work on few rows where a step wants few. Other rows of its output are zero.

    Args:
        ffn: takes and gives [1, T, H], each row for itself; whatever else it is given or gives, it is left alone.
        layer: its number.
    """

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        step = current_step()
        if step is None or len(arguments) != 1:
            return None
        rows = _rows(step, layer, arguments[0])
        if rows is None:
            return None
        step.scratch[_KEY] = rows, arguments[0].shape
        return (arguments[0][:, rows],)

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        step = current_step()
        if step is None or _KEY not in step.scratch:
            return None
        rows, shape = cast(tuple[Tensor, torch.Size], step.scratch.pop(_KEY))
        whole = output.new_zeros(shape)
        whole[:, rows] = output
        return whole

    ffn.register_forward_pre_hook(before)
    ffn.register_forward_hook(after)


def _rows(step: StepContext, layer: int, hidden: Tensor) -> Tensor | None:
    """The rows to work on, or None for all of them."""
    if step.wanted is None or any(_needs_all(chunk, layer) for chunk in step.chunks):
        return None
    length = len(step.wanted) + missing_rows(len(step.wanted), step.rows) or step.rows
    if hidden.ndim != 3 or hidden.shape[0] != 1 or 2 * length > hidden.shape[1]:
        return None
    rows = [*step.wanted, *[0] * (length - len(step.wanted))]
    return torch.tensor(rows, device=hidden.device)


def _needs_all(chunk: Chunk, layer: int) -> bool:
    """Its rows are read by a bank, or its experts counted in every row."""
    return chunk.experts is not None or (chunk.banks is not None and layer in chunk.banks.banks)
