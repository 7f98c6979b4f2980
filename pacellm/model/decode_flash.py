"""Decode attention by flash-attn's ``flash_attn_with_kvcache``, where Triton is missing and flash-attn is installed.

The slab is a paged cache as it lies: a block of ``DecodeRows.BLOCK`` tokens is a page. Shared beginnings are read by
each sequence. Source: FlashAttention 2 (Dao 2023), the package ``flash_attn``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pacellm.model.context import DecodeRows


def attend(
    query: Tensor, keys: Tensor, values: Tensor, rows: DecodeRows, scale: float, window: int | None, splits: int | None
) -> Tensor:
    """[B, H, D] from queries [H, B, D], keys and values [Hkv, slots, D].

    Args:
        splits: parts that keys are cut into; None: as the kernel sees fit.

    Raises:
        ImportError: flash-attn is not installed.
    """
    from flash_attn import flash_attn_with_kvcache

    pages = keys.shape[1] // DecodeRows.BLOCK
    # a padding row's block is nobody's slot behind the last page; what it reads instead is dropped
    tables = (rows.tables // DecodeRows.BLOCK).clamp(max=pages - 1)
    output: Any = flash_attn_with_kvcache(
        query.transpose(0, 1)[:, None], _paged(keys, pages), _paged(values, pages), cache_seqlens=rows.lengths,
        block_table=tables, softmax_scale=scale, causal=True,
        window_size=(window - 1, 0) if window else (-1, -1), num_splits=splits or 0,
    )  # fmt: skip
    found: Tensor = output[:, 0]
    return found


def _paged(slab: Tensor, pages: int) -> Tensor:
    """[pages, BLOCK, Hkv, D], in place."""
    block = DecodeRows.BLOCK
    return slab[:, : pages * block].unflatten(1, (pages, block)).permute(1, 2, 0, 3)
