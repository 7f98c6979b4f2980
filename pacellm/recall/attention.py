"""Votes by attention: how much of it a question's tokens would give each block, in the layers that retrieve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pacellm.kv.history import History
from pacellm.model.rotation import KeyRotation
from pacellm.view import Span

_AT_ONCE = 8192  # tokens of the history


@torch.inference_mode()
def attention_mass(
    queries: Tensor,
    scale: float,
    question: Sequence[int],
    history: History,
    part: int,
    end: int,
    rotation: KeyRotation | None,
    *,
    distance: int,
    block: int,
) -> Tensor:
    """[Hkv, G, n, end / block] float32: the softmax mass over the history's first ``end`` tokens that each of the
    question's tokens puts on each block, every key as if it stood ``distance`` tokens before it.

    Args:
        queries: [H, n, D], turned to ``question``'s positions.
        scale: of the scores.
        question: positions of tokens.
        history, part: whose keys, and which of a block's parts they are.
        rotation: of the layer.
    """
    rows = torch.tensor(list(question))
    asked = queries if rotation is None else rotation.moved(queries, distance - rows)
    heads = history.blocks[0].parts[part].shape[0]
    asked = asked.float().reshape(heads, -1, queries.shape[-1]) * scale  # a group's heads side by side
    sums, peaks = [], []
    for start in range(0, end, _AT_ONCE):
        stop = min(start + _AT_ONCE, end)
        keys = torch.cat([one.parts[part][:, a:b] for one, a, b in history.pieces(Span(start, stop - start))], 1)
        keys = keys.to(queries.device)
        if rotation is not None:
            keys = rotation.moved(keys, -torch.arange(start, stop))
        scores = asked @ keys.float().transpose(-1, -2)
        peak = scores.amax(-1)
        weights = (scores - peak[..., None]).exp()
        sums.append(weights.unflatten(-1, (-1, block)).sum(-1))
        peaks.append(peak)
    return _mass(sums, torch.stack(peaks)).unflatten(1, (-1, len(rows)))


def votes_by_mass(mass: Tensor, lengths: Sequence[int]) -> Tensor:
    """[len(lengths), blocks]: of each question, over KV heads, the largest mean of the mass that its tokens put on each
    block.

    Args:
        mass: [Hkv, G, n, blocks] of :func:`attention_mass`. lengths: tokens of each question, n together.
    """
    return torch.stack([one.flatten(1, 2).mean(1).amax(0) for one in mass.split(list(lengths), 2)])


def _mass(sums: Sequence[Tensor], peaks: Tensor) -> Tensor:
    """[Hkv, R, blocks] softmax mass of sums [Hkv, R, b] whose exponents were taken from ``peaks`` [parts, Hkv, R]."""
    shares = (peaks - peaks.amax(0)).exp()
    mass = torch.cat([part * share[..., None] for part, share in zip(sums, shares, strict=True)], -1)
    return mass / mass.sum(-1, keepdim=True)
