"""Attention kernels for prompts' chunks on CUDA, behind one interface; ``choice.py`` says which is used.

A kernel gets the queries of a plan's rows and the slab, and gives ([n, H, D], log-sum-exp [n, H]); causal is aligned to
the lower right of each part. Every kernel reads keys and values where they lie.

- ``flash``: ``aten::_flash_attention_forward`` (FlashAttention 2, Dao 2023), in every CUDA build of torch >= 2.11. All
  parts in one call: ``cu_seqlens_k`` tells where each one's keys start in the slab, ``seqused_k`` how many there are.
- ``flash-attn-3``: ``flash_attn_interface.flash_attn_varlen_func`` (Shah et al. 2024), called the same way.
- ``flash-attn-2``: ``flash_attn.flash_attn_func`` for one part after another, since its variable-length function takes
  no ``seqused_k``, and a part's keys end before the next one's start. Both are candidates that were not measured on a
  GPU yet; they stay until they are.
- ``cudnn``: ``aten::_scaled_dot_product_cudnn_attention``. Its causal mask is aligned to the upper left, and it
  compiles every new shape (for about 0.4 s, sgl-project/sglang#4650), so :func:`_split` makes calls of few shapes.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pacellm.kernels import has_triton
from pacellm.model.attention.plan import AttentionPlan, Call, PlanPart, PrefillKernel
from pacellm.model.context import Chunk, Run
from pacellm.transfer import to_device

#: queries and keys of a cuDNN call are this many times a power of two
CUDNN_STEP = 1024

_flash = torch.ops.aten._flash_attention_forward


def new_plan(members: list[tuple[Chunk, Run]], causal: bool, device: torch.device, copies: int = 1) -> AttentionPlan:
    """The plan of chunks over one run each; causal where a run ends with its chunk's own tokens."""

    def upload(numbers: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=dtype), device)

    cumulative, parts = [0], []
    for chunk, run in members:
        count = chunk.stop - chunk.start
        parts.append(PlanPart(cumulative[-1], count, run.slot, run.length))
        cumulative.append(cumulative[-1] + count)
    last, rows = parts[-1], _rows([chunk for chunk, _ in members])
    return AttentionPlan(
        rows=rows if isinstance(rows, slice) else upload(rows, torch.int64),
        cu_queries=upload(cumulative),
        starts=upload([*(part.slot for part in parts), last.slot + last.length]),
        lengths=upload([part.length for part in parts]),
        max_queries=max(part.count for part in parts),
        max_keys=max(part.length for part in parts),
        causal=causal,
        parts=tuple(parts),
        copies=copies,
    )


def _rows(chunks: list[Chunk]) -> slice | list[int]:
    """The packed rows of chunks; a slice where they are neighbours."""
    if all(before.stop == after.start for before, after in itertools.pairwise(chunks)):
        return slice(chunks[0].start, chunks[-1].stop)
    return [row for chunk in chunks for row in range(chunk.start, chunk.stop)]


def merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [n, H, D] over two sets of keys, from each one's and its log-sum-exp [n, H]; as float32."""
    if has_triton(total.device):
        from pacellm.model import fused_triton

        return fused_triton.merge(total, lse, part, part_lse)
    both = torch.logaddexp(lse, part_lse)
    return total * (lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None], both


def merge_copies(parts: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [n, H, D] over S sets of keys, from [S, n, H, D] and [S, n, H]; as float32, and its log-sum-exp."""
    if has_triton(parts.device):
        from pacellm.model import fused_triton

        return fused_triton.merge_copies(parts, lse)
    return (parts * lse.softmax(0)[..., None]).sum(0), lse.logsumexp(0)


def load(name: str) -> PrefillKernel:
    """A kernel by its name.

    Raises:
        Exception: of any kind; it is not installed here, or not in a form that fits.
    """
    others = {"cudnn": _cudnn, "flash-attn-2": _flash_attn_2, "flash-attn-3": _flash_attn_3}
    return FLASH if name == FLASH.name else others[name]()


def _call_flash(
    queries: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """A single query at the end of its keys sees all of them, so nothing is causal about it; said so, the kernel packs
    the heads of a group and splits the keys."""
    causal = plan.causal and (plan.max_queries > 1 or window is not None)
    result = _flash(
        queries, keys, values, plan.cu_queries, plan.starts, plan.max_queries, plan.max_keys, 0.0, causal, False,
        scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0 if causal else -1,
        seqused_k=plan.lengths,
    )  # fmt: skip
    return result[0], result[1].transpose(0, 1)


FLASH = PrefillKernel("flash", _call_flash)


def _flash_attn_3() -> PrefillKernel:
    from flash_attn_interface import flash_attn_varlen_func

    names = _parameters(flash_attn_varlen_func, "seqused_k", "softmax_scale", "causal", "window_size")
    # later versions give the log-sum-exp where they are asked, and cut the keys as they see fit where told nothing
    more: dict[str, Any] = {"return_attn_probs": True, "num_splits": 0}
    more = {name: value for name, value in more.items() if name in names}

    def call(
        queries: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        causal = plan.causal and (plan.max_queries > 1 or window is not None)
        result = flash_attn_varlen_func(
            queries, keys, values, plan.cu_queries, plan.starts, plan.max_queries, plan.max_keys,
            seqused_k=plan.lengths, softmax_scale=scale, causal=causal,
            window_size=(window - 1, 0) if window else (-1, -1), **more,
        )  # fmt: skip
        return result[0], result[1].transpose(0, 1)

    return PrefillKernel("flash-attn-3", call)


def _flash_attn_2() -> PrefillKernel:
    from flash_attn import flash_attn_func

    _parameters(flash_attn_func, "softmax_scale", "causal", "window_size", "return_attn_probs")

    def one_part(
        queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        result = flash_attn_func(
            queries[None], keys[None], values[None], softmax_scale=scale, causal=causal,
            window_size=(window - 1, 0) if window else (-1, -1), return_attn_probs=True,
        )  # fmt: skip
        return result[0][0], result[1][0, :, : len(queries)].transpose(0, 1)

    return PrefillKernel("flash-attn-2", _each(one_part), least=64)


def _parameters(function: Callable[..., Any], *wanted: str) -> frozenset[str]:
    """Names of a function's parameters.

    Raises:
        TypeError: one of those wanted is not among them.
    """
    names = frozenset(inspect.signature(function).parameters)
    if missing := [name for name in wanted if name not in names]:
        raise TypeError(f"{getattr(function, '__name__', function)} takes no {' and no '.join(missing)}")
    return names


def _cudnn() -> PrefillKernel:
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention

    def square(queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        query, key, value = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        result = operator(query, key, value, None, True, 0.0, causal, False, scale=scale)
        lse = result[1].reshape(queries.shape[1], len(queries))
        return result[0][0].transpose(0, 1), lse.transpose(0, 1)

    def one_part(
        queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        return _split(square, queries, keys, values, causal, scale)

    return PrefillKernel("cudnn", _each(one_part), least=CUDNN_STEP, windows=False)


def _each(one_part: Callable[..., tuple[Tensor, Tensor]]) -> Call:
    """A plan's parts one after another."""

    def call(
        queries: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        found = []
        for part in plan.parts:
            rows, slots = slice(part.first, part.first + part.count), slice(part.slot, part.slot + part.length)
            found.append(one_part(queries[rows], keys[slots], values[slots], plan.causal, scale, window))
        if len(found) == 1:
            return found[0]
        return torch.cat([output for output, _ in found]), torch.cat([lse for _, lse in found])

    return call


def _split(
    square: Callable[..., tuple[Tensor, Tensor]],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one part from calls of few shapes; what is no multiple of ``CUDNN_STEP`` is computed by flash."""
    count, length = len(queries), len(keys)
    found = []
    for rows in _powers(count):
        seen = length - count + rows.stop if causal else length
        found.append(_block(square, queries[rows], keys[:seen], values[:seen], causal, scale))
    if rest := count % CUDNN_STEP:
        found.append(_flash_dense(queries[-rest:], keys, values, causal, scale))
    if len(found) == 1:
        return found[0]
    return torch.cat([output for output, _ in found]), torch.cat([lse for _, lse in found])


def _block(
    square: Callable[..., tuple[Tensor, Tensor]],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a block of queries, merged by log-sum-exp: keys before its own are seen by all of them, so they are
    cut into powers of two; its own are a square, the one shape whose causal mask is the same from both corners."""

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        before = len(keys) - len(queries) if causal else len(keys)
        for at in _powers(before):
            yield square(queries, keys[at], values[at], False, scale)
        if rest := before % CUDNN_STEP:
            at = slice(before - rest, before)
            yield _flash_dense(queries, keys[at], values[at], False, scale)
        if causal:
            yield square(queries, keys[before:], values[before:], True, scale)

    output, lse = functools.reduce(lambda total, part: merge(*total, *part), parts())
    return output.to(queries.dtype), lse


def _powers(length: int) -> Iterator[slice]:
    """``length`` without its rest, cut into pieces of ``CUDNN_STEP`` times a power of two, longest first."""
    start = 0
    while units := (length - start) // CUDNN_STEP:
        size = CUDNN_STEP << (units.bit_length() - 1)
        yield slice(start, start + size)
        start += size


def _flash_dense(queries: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One part by ``flash``, without tensors that say where it lies."""
    result = _flash(
        queries[None], keys[None], values[None], None, None, len(queries), len(keys), 0.0, causal, False, scale=scale
    )
    return result[0][0], result[1][0].transpose(0, 1)
