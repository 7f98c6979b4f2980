"""Cosines of inner activations with keys, in the shapes in which they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pacellm.memory.state import compute_dtype
from pacellm.rows import pad_rows

TOGETHER = 4
"""Rows of a product of one of them; a single row's bits would depend on where in memory it lies."""
Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks of a tensor-parallel group."""


def cosine(x: Tensor, keys: Tensor, wide: torch.dtype, total: Total | None = None) -> Tensor:
    """[n, M] cosines of a segment with one bank's keys; a zero vector is similar to nothing (0)."""
    x, keys = x.to(wide), keys.to(wide)
    if total is not None:
        squares = (x * x).sum(1, keepdim=True), (keys * keys).sum(1).expand(x.shape[0], -1)
        return cosines_of_parts(torch.nn.functional.linear(x, keys), *squares, total)
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True) * torch.linalg.vector_norm(keys, dim=1)
    return torch.nn.functional.linear(x, keys) / lengths.clamp(min=1e-12)


def cosines_of_parts(products: Tensor, own: Tensor, stored: Tensor, total: Total) -> Tensor:
    """[n, M] cosines where each rank holds a part of F.

    Args:
        products: [n, M]. own: [n, 1] and stored: [n, M], squares of both sides. All of them this rank's part.
        total: sums over the ranks.
    """
    slots = products.shape[1]
    products, own, stored = total(torch.cat([products, own, stored], dim=1)).split([slots, 1, slots], dim=1)
    return products / (own.sqrt() * stored.sqrt()).clamp(min=1e-12)


def cosines(
    stored: Sequence[Tensor],
    places: Sequence[tuple[Tensor, int]],
    masks: Sequence[Tensor | None],
    total: Total | None = None,
) -> Tensor:
    """[N, M] cosines of N tokens, each with its own bank's keys.

    Args:
        stored: keys [M, F].
        places: a matrix [T, F] and which of its rows is the token's.
        masks: for each [F] bool, the neurons that its similarities are about; None is all.
        total: sums over the ranks that F is split over, where it is.
    """
    products, lengths, squared = [], [], []
    for keys, (matrix, row), mask in zip(stored, places, masks, strict=True):  # what was just read is still near
        rows, row = together(matrix, row)
        rows = rows.to(compute_dtype(rows.dtype))
        keys = keys.to(rows.dtype)
        if total is not None:
            own, other = (rows * rows).sum(1), (keys * keys).sum(1)
        else:
            keys = keys if mask is None else keys * mask
            own, other = torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(keys, dim=1)
        products.append(torch.mm(rows, keys.T)[row])
        lengths.append(own[row : row + 1])
        squared.append(other)
    product, own, other = torch.stack(products), torch.stack(lengths), torch.stack(squared)
    if total is not None:
        return cosines_of_parts(product, own, other, total)
    return product.div_(other.mul_(own).clamp_(min=1e-12))


def together(matrix: Tensor, row: int) -> tuple[Tensor, int]:
    """The ``TOGETHER`` rows that a product with one row of a matrix is made of, and which of them it is."""
    first = row - row % TOGETHER
    return pad_rows(matrix[first : first + TOGETHER], TOGETHER), row - first
