"""Attention on CUDA: one variable-length flash call per run, reading the slab in place.

``cu_seqlens_k`` gives where each sequence's run starts in the slab and ``seqused_k`` how long it is, so nothing is
gathered; sequences with several runs take one more call per run, merged by log-sum-exp. Only the last call is
causal (aligned to the lower right), so a chunk's own tokens must lie in its last run; where they do not, or with
a sliding window over several runs, the sequence's KV is gathered into scratch first.

The kernel takes float16 and bfloat16 only, heads of a multiple of 8 up to 256, and values as wide as keys
(:func:`why_not` says so at load).

Source: ``aten::_flash_attention_forward`` (FlashAttention 2, Dao 2023), present in torch >= 2.11 without flash-attn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.memory.feed import Tokens
from pacellm.model.context import Chunk, DecodeRows, KVShape, Run, StepContext

DETERMINISTIC_SPLITS = 32  # of a sequence's keys in decode, whatever the batch
_TOLERANCE = 0.03
_use_decode_kernel = False
_kernel = torch.ops.aten._flash_attention_forward


@dataclass(frozen=True)
class _Plan:
    """Where one call reads: the packed rows of the sequences with an i-th run, and those runs."""

    rows: Tensor
    cu_queries: Tensor
    starts: Tensor
    lengths: Tensor
    max_queries: int
    max_keys: int
    causal: bool


def why_not(dtype: torch.dtype, key_size: int, value_size: int) -> str | None:
    """Why the kernel cannot serve a model of this type and these head sizes; None where it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"attention on CUDA takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if key_size != value_size or key_size % 8 or key_size > 256:
        return f"attention on CUDA takes heads of a multiple of 8 up to 256, not {key_size} and {value_size}"
    return None


def attend(step: StepContext, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
    """[H, T, D] packed queries -> [T, H, D]."""
    keys, values = step.keys[layer].transpose(0, 1), step.values[layer].transpose(0, 1)
    queries = query.transpose(0, 1)
    decoded = _decoded(step, query.device)
    chunks = step.chunks if decoded is None else [chunk for chunk in step.chunks if not chunk.num_decoded]
    simple = [chunk for chunk in chunks if _in_place(chunk, window)]
    gathered = [chunk for chunk in chunks if not _in_place(chunk, window)]
    output = queries.new_zeros(queries.shape)
    if decoded is not None:
        rows, told = decoded
        splits = DETERMINISTIC_SPLITS if step.deterministic else None
        found = _decode_kernel()(query[:, rows], step.keys[layer], step.values[layer], told, scale, window, splits)
        output.index_copy_(0, rows, found)
    if simple:
        total, lse = None, None
        for plan in _plans(step, simple, window, query.device):
            part, part_lse = _call(queries, keys, values, plan, scale, window)
            total, lse = _merge(total, lse, part, part_lse, plan.rows, queries)
        output = _scatter(output, total, simple, len(simple) == len(step.chunks))
    for chunk in gathered:
        step.failing = chunk
        _attend_gathered(chunk, queries, keys, values, scale, window, output)
    step.failing = None
    return output


def attend_decoded(step: StepContext, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
    """[H, B, D] queries of a step that only decodes, told by ``step.decode`` -> [B, H, D]."""
    assert step.decode is not None
    splits = DETERMINISTIC_SPLITS if step.deterministic else None
    return _decode_kernel()(query, step.keys[layer], step.values[layer], step.decode, scale, window, splits)


def no_decode_kernel(shapes: list[KVShape], dtype: torch.dtype, device: torch.device) -> str | None:
    """Try the Triton kernel out on every size of the model's heads, and use it from here on if it was right.

    Returns:
        Why it is not used, or None.
    """
    global _use_decode_kernel
    try:
        worst = max(_error(shape, dtype, device) for shape in set(shapes))
    except Exception as error:
        problem: str | None = f"{type(error).__name__}: {error}"
    else:
        problem = None if worst < _TOLERANCE else f"it is off by {worst:.2g}"
    _use_decode_kernel = problem is None
    return problem


def _error(shape: KVShape, dtype: torch.dtype, device: torch.device) -> float:
    """The kernel's largest error on random keys, two sequences of 1,100 and 70 tokens in scattered blocks."""
    (heads, size), (_, width) = shape
    generator = torch.Generator(device).manual_seed(0)
    block = DecodeRows.BLOCK

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    query, keys, values = random(4 * heads, 2, size), random(heads, 4 * block, size), random(heads, 4 * block, width)
    tables = torch.tensor([[3 * block, 0, 2 * block], [block, 0, 0]], dtype=torch.int32, device=device)
    lengths, worst = (1100, 70), 0.0
    index = torch.arange(2, device=device)
    rows = DecodeRows(
        index, torch.tensor(lengths, dtype=torch.int32, device=device), tables, Tokens(index, index > 1, index > 1)
    )
    found = _decode_kernel()(query, keys, values, rows, size**-0.5, None, None)
    for row, length in enumerate(lengths):
        slots = (tables[row].long()[:, None] + torch.arange(block, device=device)).flatten()[:length]
        own_keys, own_values = (slab[:, slots].float().repeat_interleave(4, 0) for slab in (keys, values))
        weights = ((query[:, row, None].float() @ own_keys.transpose(1, 2)) * size**-0.5).softmax(-1)
        worst = max(worst, float(((weights @ own_values)[:, 0] - found[row].float()).abs().max()))
    return worst


def _decode_kernel() -> Callable[..., Tensor]:
    from pacellm.model import decode_triton  # Triton comes with torch's CUDA builds only

    return decode_triton.attend


def _decoded(step: StepContext, device: torch.device) -> tuple[Tensor, DecodeRows] | None:
    """The packed rows of sequences that decode, and where their keys lie: built once a step. None where there are none,
    or no kernel for them: then they go with the prompts' chunks."""
    if not _use_decode_kernel:
        return None
    if "decoded" not in step.scratch:
        step.scratch["decoded"] = _build_decoded(step.chunks, device)
    return step.scratch["decoded"]  # type: ignore[return-value]


def _build_decoded(chunks: list[Chunk], device: torch.device) -> tuple[Tensor, DecodeRows] | None:
    members = [chunk for chunk in chunks if chunk.num_decoded]
    if not members:
        return None
    rows, lengths, tables = [], [], []
    for chunk in members:
        blocks = [run.slot + start for run in chunk.runs for start in range(0, run.length, DecodeRows.BLOCK)]
        for row in range(chunk.start, chunk.stop):
            rows.append(row)
            lengths.append(chunk.position + row - chunk.start + 1)
            tables.append(blocks)
    width = max(len(table) for table in tables)
    numbers = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32)
    upload = _uploader(device)
    nothing = upload(torch.zeros(len(rows), dtype=torch.bool))
    index = upload(torch.tensor(rows))
    told = DecodeRows(
        index, upload(torch.tensor(lengths, dtype=torch.int32)), upload(numbers), Tokens(index, nothing, nothing)
    )
    return index, told


def _in_place(chunk: Chunk, window: int | None) -> bool:
    used = _used_runs(chunk)
    return len(used) == 1 or (window is None and used[-1].start <= chunk.position)


def _used_runs(chunk: Chunk) -> list[Run]:
    end = chunk.position + chunk.stop - chunk.start
    return [Run(run.start, run.slot, min(run.length, end - run.start)) for run in chunk.runs if run.start < end]


def _plans(step: StepContext, chunks: list[Chunk], window: int | None, device: torch.device) -> list[_Plan]:
    """Built once a step for each window, because that decides which chunks are read in place; kept in scratch."""
    name = f"cuda plans, window {window}"
    kept = step.scratch.get(name)
    if kept is None:
        kept = step.scratch[name] = _build_plans(chunks, device)
    return kept  # type: ignore[return-value]


def _build_plans(chunks: list[Chunk], device: torch.device) -> list[_Plan]:
    used = [_used_runs(chunk) for chunk in chunks]
    plans = []
    for number in range(max(len(runs) for runs in used)):
        for causal in (False, True):
            members = [
                (chunk, runs[number])
                for chunk, runs in zip(chunks, used, strict=True)
                if number < len(runs) and (number == len(runs) - 1) == causal
            ]
            if members:
                plans.append(_plan(members, causal, device))
    return plans


def _plan(members: list[tuple[Chunk, Run]], causal: bool, device: torch.device) -> _Plan:
    counts = [chunk.stop - chunk.start for chunk, _ in members]
    rows = [row for chunk, _ in members for row in range(chunk.start, chunk.stop)]

    send = _uploader(device)

    def upload(numbers: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return send(torch.tensor(numbers, dtype=dtype))

    cumulative = [0]
    for count in counts:
        cumulative.append(cumulative[-1] + count)
    starts = [run.slot for _, run in members]
    return _Plan(
        rows=upload(rows, torch.int64),
        cu_queries=upload(cumulative),
        starts=upload([*starts, starts[-1] + members[-1][1].length]),
        lengths=upload([run.length for _, run in members]),
        max_queries=max(counts),
        max_keys=max(run.length for _, run in members),
        causal=causal,
    )


def _uploader(device: torch.device) -> Callable[[Tensor], Tensor]:
    if device.type == "cuda":
        return lambda host: host.pin_memory().to(device, non_blocking=True)
    return lambda host: host.to(device)


def _call(
    queries: Tensor, keys: Tensor, values: Tensor, plan: _Plan, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """([n, H, D], lse [n, H]) of the plan's rows over the plan's runs.

    A single query at the end of its keys sees all of them, so nothing is causal about it; said so, the kernel packs the
    heads of a group and splits the keys.
    """
    causal = plan.causal and (plan.max_queries > 1 or window is not None)
    result = _kernel(
        queries[plan.rows], keys, values, plan.cu_queries, plan.starts, plan.max_queries, plan.max_keys, 0.0,
        causal, False, scale=scale, window_size_left=window - 1 if window else -1,
        window_size_right=0 if causal else -1, seqused_k=plan.lengths,
    )  # fmt: skip
    return result[0], result[1].transpose(0, 1)


def _merge(
    total: Tensor | None, lse: Tensor | None, part: Tensor, part_lse: Tensor, rows: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor]:
    if total is None or lse is None:
        total = queries.new_zeros(queries.shape)
        lse = torch.full(queries.shape[:2], -torch.inf, dtype=torch.float32, device=queries.device)
    old = lse[rows]
    both = torch.logaddexp(old, part_lse)
    mixed = total[rows] * (old - both).exp()[..., None] + part * (part_lse - both).exp()[..., None]
    total[rows] = mixed.to(total.dtype)
    lse[rows] = both
    return total, lse


def _scatter(output: Tensor, total: Tensor | None, chunks: list[Chunk], everything: bool) -> Tensor:
    assert total is not None
    if everything:
        return total
    for chunk in chunks:
        output[chunk.start : chunk.stop] = total[chunk.start : chunk.stop]
    return output


def _attend_gathered(
    chunk: Chunk, queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, output: Tensor
) -> None:
    runs = _used_runs(chunk)
    key, value = (torch.cat([slab[run.slot : run.slot + run.length] for run in runs]) for slab in (keys, values))
    whole = Run(0, 0, key.shape[0])
    plan = _plan([(chunk, whole)], True, queries.device)
    output[chunk.start : chunk.stop] = _call(queries, key, value, plan, scale, window)[0]
