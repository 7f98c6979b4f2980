"""Attention in the plainest form, to compare with."""

import math

import torch


def plain(query, key, value, scale, window):
    """float64, all at once. [H, n, D] queries at the last n positions of [Hkv, N, D] keys -> [n, H, D]."""
    group = query.shape[0] // key.shape[0]
    key, value = (x.double().repeat_interleave(group, 0) for x in (key, value))
    scores = query.double() @ key.transpose(1, 2) * scale
    positions = torch.arange(key.shape[1], device=key.device)
    distance = positions[key.shape[1] - query.shape[1] :, None] - positions
    hidden = (distance < 0) | (distance >= (window or math.inf))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1)


def scatter(source, runs, size):
    """A slab [H, size, D] that holds source [H, N, D] in ``runs``, and what must not be read elsewhere."""
    slab = source.new_full((source.shape[0], size, source.shape[2]), 9.0)
    for run in runs:
        part = source[:, run.start : run.start + run.length]
        slab[:, run.slot : run.slot + part.shape[1]] = part
    return slab
