"""One attention function for every served architecture, registered with transformers.

It stores the step's new keys and values in the KV slab and attends each sequence over its own runs. No mask
function is registered under its name, so models build no masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from pacellm.kernels import has_triton
from pacellm.model.attention import cpu as attention_cpu
from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.attention.form import Form
from pacellm.model.attention.temperature import tempered
from pacellm.model.context import LayerProbe, StepContext, current_step
from pacellm.model.families import FAMILIES

NAME = "pacellm"
_FEW = 4  # rows that are copied one by one on a CPU; more cost less by index
# what models pass along beside what is honoured, and what changes nothing here: positions are in the keys already
_HARMLESS = frozenset(
    ("position_ids", "position_embeddings", "use_cache", "cache_position", "is_causal", "output_attentions",
     "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "head_mask")
)  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the current step.

    Args:
        module: the attention module; its ``layer_idx`` names the layer's slab.
        query: [1, H, T, D] packed queries. key: [1, Hkv, T, D]. value: [1, Hkv, T, D].
        attention_mask: must be None; which tokens are seen follows from the step.
        scaling: of the scores; None is D ** -0.5.
        sliding_window: a query sees itself and ``sliding_window - 1`` tokens before it; None sees all.

    Returns:
        ([1, T, H, D], None)

    Raises:
        RuntimeError: no step is running, or the model asks for something that would be ignored.
    """
    step = current_step()
    if step is None:
        raise RuntimeError("this model only runs inside the engine's step; load it without PaceLLM for plain use")
    form = _form(module, query, scaling, sliding_window, kwargs)
    _check_honoured(kwargs | {"attention_mask": attention_mask, "dropout": dropout or None})
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if step.probe is not None:
        return _probed(step.probe, layer, query, key, value, form), None
    size, value_size = max(query.shape[3], value.shape[3]), value.shape[3]
    query = tempered(module, step, query)
    query, key, value = (_widen(part, size) for part in (query, key, value))
    write_rows(step, [(step.keys[layer], key[0]), (step.values[layer], value[0])])
    _keep_questions(step, layer, query[0], form.scale)
    output = _attended(step, layer, query[0], form)
    return output[None, ..., :value_size], None


def _check_honoured(given: dict[str, Any]) -> None:
    unknown = sorted(name for name, value in given.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise RuntimeError(f"attention was given what it cannot honour: {', '.join(unknown)}")


def _keep_questions(step: StepContext, layer: int, query: Tensor, scale: float) -> None:
    """Queries, [H, T, D], of chunks that look for what to call back."""
    for chunk in step.chunks:
        if chunk.asked is not None and layer in chunk.asked.layers:
            chunk.asked.queries[layer] = query[:, chunk.start : chunk.stop].clone()
            chunk.asked.scales[layer] = scale


def _probed(probe: dict[int, LayerProbe], layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
    """Zeros in place of attention; what the layer works on is written down."""
    if layer in probe:
        raise RuntimeError(f"attention runs more than once in layer {layer}")
    size = max(query.shape[3], value.shape[3])
    shapes = (key.shape[1], size), (value.shape[1], size)
    probe[layer] = LayerProbe(shapes, form.special, query.shape[1], form.window, key[0].clone())
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _attended(step: StepContext, layer: int, query: Tensor, form: Form) -> Tensor:
    """[H, T, D] -> [T, H, D], on the step's device."""
    if query.device.type == "cpu":
        return attention_cpu.attend_on_cpu(step, layer, query, form)
    if step.decode is not None:
        return attention_cuda.attend_decoded_on_cuda(step, layer, query, form.scale, form.window)
    return attention_cuda.attend_on_cuda(step, layer, query, form.scale, form.window)


def _form(
    module: nn.Module, query: Tensor, scaling: float | None, sliding_window: int | None, kwargs: dict[str, Any]
) -> Form:
    """What the layer asks for; windows and chunks that the model tells its mask alone are read from its config."""
    config: Any = getattr(module, "config", None)
    chunk = None
    family = FAMILIES.get(getattr(config, "model_type", ""))
    types = getattr(config, "layer_types", None)
    kind = types[int(module.layer_idx)] if types else None  # type: ignore[arg-type]
    if family is not None and family.window_in_mask and kind != "full_attention":
        sliding_window = config.sliding_window
    if kind == "chunked_attention":
        chunk = int(config.attention_chunk_size)
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Form(float(scale), sliding_window, chunk, softcap, sinks)


def _widen(part: Tensor, size: int) -> Tensor:
    """Heads filled up with zeros, where keys and values differ in size: kernels want them alike, and zeros add
    nothing to a score."""
    return part if part.shape[-1] == size else nn.functional.pad(part, (0, size - part.shape[-1]))


def write_rows(step: StepContext, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Put what the step's tokens have into slabs, at each chunk's places.

    Args:
        pairs: slabs [heads, slots, D], and what goes there [heads, T, D].
    """
    device = pairs[0][1].device
    if step.decode is not None:
        _write_decoded(pairs, step.decode.slots)
        return
    places = step.scratch.get("places")
    if not isinstance(places, Places):
        places = step.scratch["places"] = _places(step, device)
    for slab, new in pairs:
        for source, target in places.runs:
            slab[:, target] = new[:, source]
        if places.rows is not None and places.slots is not None:
            slab.index_copy_(1, places.slots, new[:, places.rows])


def _write_decoded(pairs: list[tuple[Tensor, Tensor]], slots: Tensor) -> None:
    if len(pairs) == 2 and has_triton(slots.device):
        from pacellm.model import fused_triton

        (keys, key), (values, value) = pairs
        fused_triton.store(keys, values, slots, key, value)
        return
    for slab, new in pairs:
        slab.index_copy_(1, slots, new)


@dataclass(frozen=True)
class Places:
    """Where a step's rows belong: (rows, slots) of adjacent ones, and the single ones by index."""

    runs: list[tuple[slice, slice]]
    rows: Tensor | None
    slots: Tensor | None


def _places(step: StepContext, device: torch.device) -> Places:
    runs: list[tuple[slice, slice]] = []
    rows: list[int] = []
    slots: list[int] = []
    for chunk in step.chunks:
        end = chunk.position + chunk.stop - chunk.start
        for run in chunk.runs:
            first, last = max(run.start, chunk.position), min(run.start + run.length, end)
            row, slot, count = chunk.start + first - chunk.position, run.slot + first - run.start, last - first
            if count == 1:
                rows.append(row)
                slots.append(slot)
            elif count > 1:
                runs.append((slice(row, row + count), slice(slot, slot + count)))
    if len(rows) <= _FEW and device.type == "cpu":
        runs += [(slice(row, row + 1), slice(slot, slot + 1)) for row, slot in zip(rows, slots, strict=True)]
        rows = []
    if not rows:
        return Places(runs, None, None)
    return Places(runs, torch.tensor(rows, device=device), torch.tensor(slots, device=device))


def register() -> None:
    """Make the function known to transformers under ``NAME``."""
    AttentionInterface.register(NAME, attention_forward)


def slab(shapes: list[tuple[int, int]], num_slots: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeroed KV memory, [kv heads, slots, head size] per layer.

    On a CPU it is memory that the system zeroes when it is first touched, so what no request has used costs nothing;
    ``torch.zeros`` would touch it all.
    """
    sizes = [(heads, num_slots, size) for heads, size in shapes]
    if device.type != "cpu":
        return [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
    return [
        torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, np.uint8)).view(dtype).view(size) for size in sizes
    ]
