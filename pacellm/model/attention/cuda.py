"""Attention on CUDA: one call per run, reading the slab in place.

A plan tells where each sequence's run lies in the slab, so nothing is gathered; sequences with several runs take one
more call per run, merged by log-sum-exp. Only the last call is causal (aligned to the lower right), so a chunk's own
tokens must lie in its last run; where they do not, or with a sliding window over several runs, the sequence's KV is
gathered into scratch first.

The kernel is the step's (prefill.py); what it does not take is computed by flash, in a call of its own. Flash
takes float16 and bfloat16 only, heads of a multiple of 8 up to 256, and values as wide as keys (:func:`why_not` says
so at load).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from pacellm.memory.tokens import DecodedTokens
from pacellm.model.attention.plan import AttentionPlan, PrefillKernel
from pacellm.model.attention.prefill import CUDNN_STEP, FLASH, merge, merge_copies, new_plan
from pacellm.model.context import Chunk, DecodeRows, KVShape, Run, StepContext
from pacellm.transfer import to_device

_PROGRAMS = 264  # two for each multiprocessor of an H100
_QUERIES = 128  # of one program
_LEAST_PIECE = 1024  # keys of a short chunk's piece
DETERMINISTIC_SPLITS = 32  # of a sequence's keys in decode, whatever the batch
_TOLERANCE = 0.03
DecodeKernel = Callable[..., Tensor]
_decode_kernel: DecodeKernel | None = None  # once it was found right


def why_not(dtype: torch.dtype, key_size: int, value_size: int) -> str | None:
    """Why the kernel cannot serve a model of this type and these head sizes; None where it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"attention on CUDA takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if key_size != value_size or key_size % 8 or key_size > 256:
        return f"attention on CUDA takes heads of a multiple of 8 up to 256, not {key_size} and {value_size}"
    return None


def attend_on_cuda(step: StepContext, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
    """[H, T, D] packed queries -> [T, H, D]."""
    keys, values = step.keys[layer].transpose(0, 1), step.values[layer].transpose(0, 1)
    queries = query.transpose(0, 1)
    output = queries.new_zeros(queries.shape)
    chunks, decoded = step.chunks, _decoded(step, query.device)
    if decoded is not None:
        chunks = [chunk for chunk in chunks if not chunk.num_decoded]
        rows, told = decoded
        found = _attend_rows(step, layer, query[:, rows], told, scale, window)
        output.index_copy_(0, rows, found)
    in_place = [chunk for chunk in chunks if _in_place(chunk, window)]
    if in_place:
        output = _attend_in_place(step, in_place, queries, keys, values, scale, window, output)
    for chunk in chunks:
        if not _in_place(chunk, window):
            step.failing = chunk
            _attend_gathered(step.kernel or FLASH, chunk, queries, keys, values, scale, window, output)
    step.failing = None
    return output


def _attend_in_place(
    step: StepContext,
    chunks: list[Chunk],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    output: Tensor,
) -> Tensor:
    """Chunks over their runs where they lie, by the step's plans; into ``output``, or in place of it."""
    total, lse = None, None
    for plan in _plans(step, chunks, queries.shape[1], window, queries.device):
        part, part_lse = _call(step.kernel or FLASH, queries, keys, values, plan, scale, window)
        total, lse = _merge(total, lse, part, part_lse, plan.target, queries)
    return _scatter(output, total, chunks, len(chunks) == len(step.chunks))


def attend_decoded_on_cuda(step: StepContext, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
    """[H, B, D] queries of a step that only decodes, told by ``step.decode`` -> [B, H, D]."""
    assert step.decode is not None
    return _attend_rows(step, layer, query, step.decode, scale, window)


def _attend_rows(
    step: StepContext, layer: int, query: Tensor, rows: DecodeRows, scale: float, window: int | None
) -> Tensor:
    assert _decode_kernel is not None
    splits = DETERMINISTIC_SPLITS if step.deterministic else None
    return _decode_kernel(query, step.keys[layer], step.values[layer], rows, scale, window, splits)


def no_decode_kernel(shapes: list[KVShape], dtype: torch.dtype, device: torch.device) -> str | None:
    """Try Triton's kernel out on every size of the model's heads, and use it from here on where it is right.

    Returns:
        Why it is not used, or None.
    """
    global _decode_kernel
    _decode_kernel = None
    try:
        kernel = _load_decode_kernel()
        errors = [_error(kernel, shape, dtype, device) for shape in set(shapes)]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong = next((found for found in errors if not found <= _TOLERANCE), None)  # also what is not a number
    if wrong is not None:
        return f"it is off by {wrong:.2g}"
    _decode_kernel = kernel
    return None


def _error(kernel: DecodeKernel, shape: KVShape, dtype: torch.dtype, device: torch.device) -> float:
    """The kernel's largest error on random keys, two sequences of 1,100 and 70 tokens in scattered blocks."""
    (heads, size), (_, width) = shape
    generator = torch.Generator(device).manual_seed(0)
    block = DecodeRows.BLOCK

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    query, keys, values = random(4 * heads, 2, size), random(heads, 4 * block, size), random(heads, 4 * block, width)
    tables = torch.tensor([[3 * block, 0, 2 * block], [block, 0, 0]], dtype=torch.int32, device=device)
    lengths, worst = (1100, 70), [torch.zeros((), device=device)]
    index = torch.arange(2, device=device)
    rows = DecodeRows(
        index,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        tables,
        DecodedTokens(index, index > 1, index > 1, index),
    )
    found = kernel(query, keys, values, rows, size**-0.5, None, None)
    for row, length in enumerate(lengths):
        slots = (tables[row].long()[:, None] + torch.arange(block, device=device)).flatten()[:length]
        own_keys, own_values = (slab[:, slots].float().repeat_interleave(4, 0) for slab in (keys, values))
        weights = ((query[:, row, None].float() @ own_keys.transpose(1, 2)) * size**-0.5).softmax(-1)
        worst.append(((weights @ own_values)[:, 0] - found[row].float()).abs().max())
    return float(torch.stack(worst).max())  # which keeps what is not a number, as Python's max would not


def _load_decode_kernel() -> DecodeKernel:
    return importlib.import_module("pacellm.model.attention.decode").decode_attention  # not everywhere


def _decoded(step: StepContext, device: torch.device) -> tuple[Tensor, DecodeRows] | None:
    """The packed rows of sequences that decode, and where their keys lie: built once a step. None where there are none,
    or no kernel for them: then they go with the prompts' chunks."""
    if _decode_kernel is None:
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
    nothing = torch.zeros(len(rows), dtype=torch.bool, device=device)
    index = to_device(torch.tensor(rows), device)
    told = DecodeRows(
        index,
        to_device(torch.tensor(lengths, dtype=torch.int32), device),
        to_device(numbers, device),
        DecodedTokens(index, nothing, nothing, index),
    )
    return index, told


def _in_place(chunk: Chunk, window: int | None) -> bool:
    used = _used_runs(chunk)
    return len(used) == 1 or (window is None and used[-1].start <= chunk.position)


def _used_runs(chunk: Chunk) -> list[Run]:
    end = chunk.position + chunk.stop - chunk.start
    return [Run(run.start, run.slot, min(run.length, end - run.start)) for run in chunk.runs if run.start < end]


def _plans(
    step: StepContext, chunks: list[Chunk], heads: int, window: int | None, device: torch.device
) -> list[AttentionPlan]:
    """Built once a step for each window, because that decides which chunks are read in place; kept in scratch."""
    name = f"cuda plans, window {window}"
    if name not in step.scratch:
        are_cut = window is None and not step.deterministic
        cuts = [(chunk, _cut(chunk, heads) if are_cut else []) for chunk in chunks]
        plans = _build_plans([chunk for chunk, pieces in cuts if not pieces], (step.kernel or FLASH).least, device)
        for chunk, pieces in cuts:
            plans += _plans_of_pieces(chunk, pieces, device)
        step.scratch[name] = plans
    return step.scratch[name]  # type: ignore[return-value]


def _plans_of_pieces(chunk: Chunk, pieces: list[Run], device: torch.device) -> list[AttentionPlan]:
    """The pieces of the keys before a chunk side by side, then its own tokens; nothing where it is not cut."""
    if not pieces:
        return []
    before = new_plan([(chunk, piece) for piece in pieces], False, device, copies=len(pieces))
    return [before, new_plan([(chunk, _own(chunk))], True, device)]


def _cut(chunk: Chunk, heads: int) -> list[Run]:
    """The keys before a short chunk in so many pieces that the device is full; [] where it is so anyway. A kernel's
    program takes the queries of one head over all keys it is given: behind 200,000 of them a short chunk would have few
    programs, each a long way to go. A candidate: not measured on a GPU yet; it stays until it is."""
    count = chunk.stop - chunk.start
    pieces = min(_PROGRAMS // (heads * -(-count // _QUERIES)), chunk.position // _LEAST_PIECE)
    if count >= CUDNN_STEP or pieces < 2:
        return []
    each, cut = -(-chunk.position // pieces), []
    for run in _used_runs(chunk):
        for start in range(run.start, min(run.start + run.length, chunk.position), each):
            stop = min(start + each, run.start + run.length, chunk.position)
            cut.append(Run(start, run.slot + start - run.start, stop - start))
    return cut


def _own(chunk: Chunk) -> Run:
    """Where a chunk's own tokens lie, which are in one run."""
    last = _used_runs(chunk)[-1]
    return Run(chunk.position, last.slot + chunk.position - last.start, chunk.stop - chunk.start)


def _build_plans(chunks: list[Chunk], least: int, device: torch.device) -> list[AttentionPlan]:
    """One for each i-th run of the sequences; chunks of fewer queries than ``least`` apart from the others."""
    groups: dict[tuple[int, bool, bool], list[tuple[Chunk, Run]]] = {}
    for chunk in chunks:
        runs = _used_runs(chunk)
        for number, run in enumerate(runs):
            kind = number, number == len(runs) - 1, chunk.stop - chunk.start >= least
            groups.setdefault(kind, []).append((chunk, run))
    return [new_plan(groups[kind], kind[1], device) for kind in sorted(groups)]


def _call(
    kernel: PrefillKernel,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """([n, H, D], lse [n, H]) of the plan's rows over the plan's runs."""
    able = kernel if kernel.takes(plan, window) else FLASH
    output, lse = able.call(queries[plan.rows], keys, values, plan, scale, window)
    if plan.copies == 1:
        return output, lse
    return merge_copies(output.unflatten(0, (plan.copies, -1)), lse.unflatten(0, (plan.copies, -1)))


def _merge(
    total: Tensor | None, lse: Tensor | None, part: Tensor, part_lse: Tensor, rows: Tensor | slice, queries: Tensor
) -> tuple[Tensor, Tensor]:
    if total is None or lse is None:
        if len(part) == len(queries):
            return part, part_lse
        total = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
        lse = torch.full(queries.shape[:2], -torch.inf, dtype=torch.float32, device=queries.device)
        total[rows], lse[rows] = part.to(total.dtype), part_lse
        return total, lse
    mixed, both = merge(total[rows], lse[rows], part, part_lse)
    total[rows] = mixed.to(total.dtype)
    lse[rows] = both
    return total, lse


def _scatter(output: Tensor, total: Tensor | None, chunks: list[Chunk], everything: bool) -> Tensor:
    assert total is not None
    if everything:
        return total.to(output.dtype)
    for chunk in chunks:
        output[chunk.start : chunk.stop] = total[chunk.start : chunk.stop]
    return output


def _attend_gathered(
    kernel: PrefillKernel,
    chunk: Chunk,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    output: Tensor,
) -> None:
    runs = _used_runs(chunk)
    key, value = (torch.cat([slab[run.slot : run.slot + run.length] for run in runs]) for slab in (keys, values))
    whole = Run(0, 0, key.shape[0])
    plan = new_plan([(chunk, whole)], True, queries.device)
    output[chunk.start : chunk.stop] = _call(kernel, queries, key, value, plan, scale, window)[0]
