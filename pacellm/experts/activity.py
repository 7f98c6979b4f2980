"""What a model's FFN neurons do while a text is read: for calibration and for pictures."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pacellm.config import EngineConfig
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.errors import RequestError
from pacellm.experts.apply import weight_features
from pacellm.experts.cluster import Features
from pacellm.model.context import current_step
from pacellm.model.load import LoadedModel
from pacellm.model.neurons import ffns
from pacellm.types import Failed, GenerationRequest, SamplingParams

See = Callable[[int, int, Tensor], None]


def read_text(model: LoadedModel, ids: Sequence[int], see: See) -> None:
    """Read a text once and show every layer's inner activations.

    Args:
        model: unpatched or with a layout; its banks are off.
        ids: the text's tokens, at most the model's context.
        see: called with (layer, position of the first token, [n, F] inner activations), positions ascending.

    Raises:
        RequestError: no text, or a longer one than the context.
    """
    engine = Engine(model, EngineConfig(pa=False, max_num_seqs=1, kv_cache_memory=_kv_bytes(model, len(ids))))
    hooks = [ffn.down.register_forward_pre_hook(_hook(ffn.layer, see)) for ffn in ffns(model.module) if ffn is not None]
    try:
        engine.add(GenerationRequest("trace", list(array("i", ids)), SamplingParams(max_tokens=0)))
        last = run_until_idle(engine)["trace"][-1]
        if isinstance(last, Failed):
            raise last.error
    finally:
        for hook in hooks:
            hook.remove()
        engine.close()


def activation_features(
    model: LoadedModel, ids: Sequence[int], *, tokens: int = 1024, seed: int = 0
) -> dict[int, Features]:
    """Co-activation over a calibration text: each neuron as its share |x| / ||x|| over sampled tokens, to length 1.

    Args:
        model: without a layout.
        ids: the text.
        tokens: how many of its tokens are looked at, chosen by ``seed``.

    Raises:
        RequestError: no text, or a longer one than the context.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(ids), generator=generator)[:tokens].sort().values
    parts: dict[int, list[Tensor]] = {}

    def see(layer: int, position: int, inner: Tensor) -> None:
        rows = chosen[(chosen >= position) & (chosen < position + len(inner))] - position
        seen = inner[rows.to(inner.device)].float().cpu()
        parts.setdefault(layer, []).append(torch.nn.functional.normalize(seen, dim=1))

    read_text(model, ids, see)
    found = {}
    for layer in weight_features(model.module):
        shares = torch.cat(parts[layer])
        points = torch.nn.functional.normalize(shares.abs().T, dim=1).contiguous()
        found[layer] = Features(points, shares.square().mean(0))
    return found


def expert_shares(model: LoadedModel, ids: Sequence[int], bins: int = 512) -> dict[int, Tensor]:
    """By layer [bins, E]: each expert's share of a token's squared activations, as means over stretches of a text.

    Args:
        model: with a layout.
        ids: the text; shorter ones have a bin for every token.

    Raises:
        RequestError: no text, a longer one than the context, or no layout.
    """
    if model.layout is None:
        raise RequestError("a picture of experts needs a layout; pass --ce-layout FILE", param="ce_layout")
    layers, bins = model.layout.layers, min(bins, len(ids))
    total = {layer: torch.zeros(bins, one.num_experts, dtype=torch.float64) for layer, one in layers.items()}
    count = torch.bincount(torch.arange(len(ids)) * bins // len(ids), minlength=bins)

    def see(layer: int, position: int, inner: Tensor) -> None:
        squares = inner.double().square().view(len(inner), layers[layer].num_experts, -1).sum(2).cpu()
        shares = squares / squares.sum(1, keepdim=True).clamp(min=1e-300)
        total[layer].index_add_(0, torch.arange(position, position + len(inner)) * bins // len(ids), shares)

    read_text(model, ids, see)
    return {layer: sums / count[:, None] for layer, sums in total.items()}


def _kv_bytes(model: LoadedModel, tokens: int) -> int:
    from pacellm.view import BLOCK

    return (tokens // BLOCK + 3) * BLOCK * model.bytes_per_token


def _hook(layer: int, see: See) -> Callable[..., None]:
    def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
        step = current_step()
        if step is not None:
            for chunk in step.chunks:
                see(layer, chunk.position, arguments[0].flatten(0, -2)[chunk.start : chunk.stop])

    return hook
