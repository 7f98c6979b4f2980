"""Attention on CPU whose every row has the same bits however the work is cut.

What a query's result is made of depends on its absolute position alone:

* Queries are taken in tiles of ``TILE`` positions. Keys before the tile are the *past*, read in windows of
  ``WINDOW`` positions from 0; keys of the tile itself are the *tail*, read under a causal mask. The parts are
  merged by log-sum-exp, in order.
* The kernel (``aten::_scaled_dot_product_flash_attention_for_cpu``) gives a row the same bits whatever rows stand
  beside it if there is a multiple of ``ROWS`` of them, and if keys come in multiples of ``BLOCK``, its own
  split. So rows are padded and the tail is read in whole blocks, which the KV allocator hands out whole.
* A part that does not lie in one run is gathered first: where the allocator put it changes no bit.
* Decoded tokens, and those that a replay feeds again, are each attended to alone, in calls whose shapes follow from
  the position, so they need no masks and only ``ROWS_ALONE`` rows, which keep the bits apart from the number of
  threads. Small windows go side by side in one call, whose batches the kernel works on apart.

The heads of a KV group are packed as query rows, so grouped keys are never repeated.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pacellm.model.attention.form import Form
from pacellm.model.context import Chunk, Run, StepContext
from pacellm.rows import ROWS, pad_rows

BLOCK = 512  # the kernel's split of the keys
TILE = 1024
WINDOW = 8192
ROWS_ALONE = 4
_SMALL_WINDOW = 128  # sliding windows up to this wide use tiles of this many positions


def attend_on_cpu(step: StepContext, layer: int, query: Tensor, form: Form) -> Tensor:
    """[H, T, D] packed queries -> [T, H, Dv], each chunk over its own runs."""
    keys, values = step.keys[layer], step.values[layer]
    window = _window_of(form)
    output = query.new_zeros(query.shape[1], query.shape[0], values.shape[-1])
    decoded: list[tuple[Chunk, int]] = []
    for chunk in step.chunks:
        step.failing = chunk
        first = step.first_row(chunk, layer)
        if window is None:
            _attend_full(chunk, first, query, keys, values, form, output)
        else:
            _attend_window(chunk, first, query, keys, values, form, window, output)
        decoded += [(chunk, row) for row in range(max(first, chunk.stop - chunk.num_decoded), chunk.stop)]
    _attend_decoded(step, decoded, query, keys, values, form, output)
    step.failing = None
    return output


def _attend_decoded(
    step: StepContext,
    decoded: list[tuple[Chunk, int]],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    form: Form,
    output: Tensor,
) -> None:
    """Decoded tokens, each over the keys it sees; packed and unpacked together."""
    if not decoded:
        return
    rows = _indices([row for _, row in decoded])
    heads, group = keys.shape[0], query.shape[0] // keys.shape[0]
    packed = query.new_zeros(len(decoded), heads, _round_up(group, ROWS_ALONE), query.shape[2])
    packed[:, :, :group] = query[:, rows].unflatten(0, (heads, group)).permute(2, 0, 1, 3)
    slots = _window_slots(step, decoded, form)
    if slots is not None:
        near_keys, near_values = (slab[:, slots].transpose(0, 1).contiguous() for slab in (keys, values))
        found = form.with_sinks(*form.kernel(packed, near_keys, near_values), group)
    else:
        found = _over_all_keys(step, decoded, packed, keys, values, form, group)
    output[rows] = found[:, :, :group].flatten(1, 2)


def _over_all_keys(
    step: StepContext,
    decoded: list[tuple[Chunk, int]],
    packed: Tensor,
    keys: Tensor,
    values: Tensor,
    form: Form,
    group: int,
) -> Tensor:
    """Decoded tokens one after another, each over the keys it sees, in windows of ``WINDOW``."""
    results = []
    for place, (chunk, row) in enumerate(decoded):
        step.failing = chunk
        one, end = packed[place : place + 1], chunk.position + row - chunk.start + 1
        total, lse = None, None
        for start in range(_oldest(form, end - 1), end, WINDOW):
            part = _read(chunk.runs, keys, values, start, min(start + WINDOW, end))
            total, lse = _merge(total, lse, *form.kernel(one, *part))
        assert total is not None
        results.append(form.with_sinks(total, lse, group))
    return results[0] if len(results) == 1 else torch.cat(results)


def _indices(rows: list[int]) -> slice | Tensor:
    """Ascending rows, as a slice where they lie side by side: views cost less than copies by index."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] < len(rows) else torch.tensor(rows)


def _window_of(form: Form) -> int | None:
    """The window that prompts are read in; None where tiles read all keys from the start, or from their chunk's."""
    if form.chunk is None or (form.chunk % TILE == 0 and form.window is None):
        return form.window
    return form.chunk if form.window is None else min(form.window, form.chunk)


def _oldest(form: Form, position: int) -> int:
    """The first position that a query sees."""
    oldest = 0 if form.window is None else max(0, position + 1 - form.window)
    return oldest if form.chunk is None else max(oldest, position - position % form.chunk)


def _window_slots(step: StepContext, decoded: list[tuple[Chunk, int]], form: Form) -> Tensor | None:
    """[n, window] slots that the decoded tokens see through a small window; None where one of them sees fewer. Found
    once a step: layers differ at most in that the last one leaves some tokens out."""
    window = form.window
    if window is None or window > _SMALL_WINDOW or form.chunk is not None:
        return None
    name = f"{len(decoded)} windows of {window}"
    kept = step.scratch.get(name)
    if isinstance(kept, Tensor):
        return kept
    ends = [chunk.position + row - chunk.start + 1 for chunk, row in decoded]
    if min(ends) < window:
        return None
    slots = [_slots(chunk.runs, end - window, end) for (chunk, _), end in zip(decoded, ends, strict=True)]
    step.scratch[name] = found = torch.stack(slots)
    return found


def _slots(runs: tuple[Run, ...], start: int, stop: int) -> Tensor:
    """Where positions ``start`` to ``stop`` lie."""
    parts = [
        torch.arange(max(run.start, start), min(run.start + run.length, stop)) + run.slot - run.start
        for run in runs
        if max(run.start, start) < min(run.start + run.length, stop)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_full(
    chunk: Chunk, first: int, query: Tensor, keys: Tensor, values: Tensor, form: Form, output: Tensor
) -> None:
    group = query.shape[0] // keys.shape[0]
    for position, rows in _tiles(chunk, first, TILE):
        tile = position - position % TILE
        end = position + rows.stop - rows.start
        packed, count = _pack(query[:, rows], group)
        total, lse = None, None
        for start in range(0 if form.chunk is None else tile - tile % form.chunk, tile, WINDOW):
            part = _read(chunk.runs, keys, values, start, min(start + WINDOW, tile))
            total, lse = _merge(total, lse, *form.kernel(packed, *part))
        span = _round_up(end - tile, BLOCK)
        part = _read(chunk.runs, keys, values, tile, tile + span)
        if position == tile:
            tail = _from_the_start(query[:, rows], *part, form, packed.shape[2])
        else:
            mask = _causal(position - tile, end - tile, span, group, packed.shape[2], packed.dtype)
            tail = form.kernel(packed, *part, mask)
        total, lse = _merge(total, lse, *tail)
        output[rows] = _unpack(form.with_sinks(total, lse, group), count, group)


def _from_the_start(query: Tensor, key: Tensor, value: Tensor, form: Form, num_rows: int) -> tuple[Tensor, Tensor]:
    """A tile's queries [H, n, D] from its first on, over the tile's own keys, packed: the kernel leaves out blocks of
    keys that nobody sees. A group's heads stand side by side there, over one view of their keys."""
    heads, group, count = key.shape[1], query.shape[0] // key.shape[1], query.shape[1]
    apart = pad_rows(query, ROWS).unflatten(0, (heads, group))
    shared_keys, shared_values = (part[0][:, None].expand(-1, group, -1, -1) for part in (key, value))
    found, lse = form.kernel(apart, shared_keys, shared_values, is_causal=True)
    packed = found[:, :, :count].transpose(1, 2).reshape(1, heads, count * group, -1)
    packed_lse = lse[:, :, :count].transpose(1, 2).reshape(1, heads, count * group)
    missing = num_rows - count * group
    return F.pad(packed, (0, 0, 0, missing)), F.pad(packed_lse, (0, missing))


def _attend_window(
    chunk: Chunk,
    first: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    form: Form,
    window: int,
    output: Tensor,
) -> None:
    group = query.shape[0] // keys.shape[0]
    size = _SMALL_WINDOW if window <= _SMALL_WINDOW else BLOCK
    past = _round_up(window - 1, size)
    tiles = _tiles(chunk, first, size)
    whole = [] if form.chunk is not None else [tile for tile in tiles if _is_whole(tile, size, past)]
    if len(whole) > 1:
        _attend_whole_tiles(chunk, whole, query, keys, values, form, window, size, output)
        tiles = [tile for tile in tiles if tile not in whole]
    for position, rows in tiles:
        tile = position - position % size
        end = position + _length(rows)
        oldest = max(0, tile - past)
        packed, count = _pack(query[:, rows], group)
        part = _read(chunk.runs, keys, values, oldest, tile + size)
        band = (position - oldest, end - oldest, tile + size - oldest, window, group, packed.shape[2], packed.dtype)
        mask = _banded(*band) if form.chunk is None else _banded(*band, form.chunk, oldest % form.chunk)
        result = form.with_sinks(*form.kernel(packed, *part, mask), group)
        output[rows] = _unpack(result, count, group)


def _attend_whole_tiles(
    chunk: Chunk,
    tiles: list[tuple[int, slice]],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    form: Form,
    window: int,
    size: int,
    output: Tensor,
) -> None:
    """Adjacent whole tiles of a sliding window, side by side in one call, which works on them apart."""
    (position, first), (_, last) = tiles[0], tiles[-1]
    count, rows = len(tiles), slice(first.start, last.stop)
    heads, group, past = keys.shape[0], query.shape[0] // keys.shape[0], _round_up(window - 1, size)
    packed = query[:, rows].reshape(heads, group, count, size, -1).permute(2, 0, 3, 1, 4)
    packed = packed.reshape(count, heads, size * group, -1)
    seen = _read(chunk.runs, keys, values, position - past, position + count * size)
    key, value = (part[0].unfold(1, past + size, size).permute(1, 0, 3, 2) for part in seen)
    mask = _banded(past, past + size, past + size, window, group, size * group, query.dtype)
    result = form.with_sinks(*form.kernel(packed, key, value, mask), group).view(count, heads, size, group, -1)
    output[rows] = result.transpose(1, 2).reshape(count * size, heads * group, -1)


def _is_whole(tile: tuple[int, slice], size: int, past: int) -> bool:
    """It has all its queries, and all the keys before it that it may see."""
    position, rows = tile
    return position % size == 0 and position >= past and _length(rows) == size


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _tiles(chunk: Chunk, row: int, size: int) -> list[tuple[int, slice]]:
    """(position of the first query, its rows) for each part of the chunk's prompt in one tile of ``size`` positions,
    from ``row`` on."""
    tiles, position, stop = [], chunk.position + row - chunk.start, chunk.stop - chunk.num_decoded
    while row < stop:
        count = min(stop - row, size - position % size)
        tiles.append((position, slice(row, row + count)))
        position, row = position + count, row + count
    return tiles


def _pack(query: Tensor, group: int) -> tuple[Tensor, int]:
    """[H, n, D] -> [1, Hkv, n * group rounded up to ``ROWS``, D], a token's group side by side; and n."""
    heads, count, size = query.shape
    packed = query.reshape(heads // group, group, count, size).transpose(1, 2).reshape(heads // group, -1, size)
    return pad_rows(packed, ROWS)[None], count


def _unpack(packed: Tensor, count: int, group: int) -> Tensor:
    """The inverse, to [n, H, D]."""
    _, heads, _, size = packed.shape
    rows = packed[0, :, : count * group].reshape(heads, count, group, size)
    return rows.permute(1, 0, 2, 3).reshape(count, heads * group, size)


def _read(runs: tuple[Run, ...], keys: Tensor, values: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, Hkv, stop - start, D] of positions start to stop; a view where they lie in one run."""
    slices = []
    for run in runs:
        first, last = max(run.start, start), min(run.start + run.length, stop)
        if first < last:
            slices.append(slice(run.slot + first - run.start, run.slot + last - run.start))
    if len(slices) == 1:
        return keys[None, :, slices[0]], values[None, :, slices[0]]
    gathered = (torch.cat([slab[:, part] for part in slices], dim=1)[None] for slab in (keys, values))
    key, value = gathered
    return key, value


def _merge(total: Tensor | None, lse: Tensor | None, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attention results over disjoint keys, as one; lse is [1, H, n].

    By ``exp`` and ``log``, whose bits do not depend on where in a tensor a number stands; those of ``logaddexp`` are
    others behind the last whole vector (with AVX-512 of 32 numbers).
    """
    if total is None or lse is None:
        return part, part_lse
    highest = torch.maximum(lse, part_lse)
    both = highest + ((lse - highest).exp() + (part_lse - highest).exp()).log()
    old, new = (lse - both).exp()[..., None], (part_lse - both).exp()[..., None]
    return total * old + part * new, both


@lru_cache(maxsize=8)
def _causal(first: int, last: int, span: int, group: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, span] mask for the tile's queries first to last, each repeated for its group; padding sees all."""
    return _expand(torch.arange(first, last)[:, None] < torch.arange(span), group, num_rows, dtype)


@lru_cache(maxsize=32)
def _banded(
    first: int,
    last: int,
    span: int,
    window: int,
    group: int,
    num_rows: int,
    dtype: torch.dtype,
    chunk: int | None = None,
    phase: int = 0,
) -> Tensor:
    """The same for a sliding window, and blocks of ``chunk`` positions where the first key stands at ``phase``."""
    queries, keys = torch.arange(first, last)[:, None], torch.arange(span)
    hidden = (keys > queries) | (queries - keys >= window)
    if chunk is not None:
        hidden |= (queries + phase) // chunk != (keys + phase) // chunk
    return _expand(hidden, group, num_rows, dtype)


def _expand(hidden: Tensor, group: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(num_rows, hidden.shape[1], dtype=dtype)
    mask[: hidden.shape[0] * group].masked_fill_(hidden.repeat_interleave(group, dim=0), -torch.inf)
    return mask


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
