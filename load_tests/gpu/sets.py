"""Decode steps on parts of the FFNs beside whole ones, and beside the bytes that the chosen parts are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from load_tests.gpu import rig as rigs
from load_tests.gpu.rig import Rig, request
from pacellm.engine.engine import Engine
from pacellm.experts.layout import LayerLayout, Layout

Cells = dict[str, Any]


def sets(rig: Rig, limits: Cells) -> Cells:
    """A step of 1, 2, 4 and 8 sequences at density 1 and at 0.5, there with prompts apart and with one prompt for all.

    Prompts and weights are random, so sets of prompts apart have little in common; one prompt gives one set.
    """
    batches, context, experts, steps = ((1, 2), 40, 6, 4) if rig.small else ((1, 2, 4, 8), 1024, 64, 50)
    rig = dataclasses.replace(rig, model=dataclasses.replace(rig.model, layout=_layout(rig, experts)))
    cells: Cells = {"experts": experts, "context": context}
    for batch in batches:
        cell: Cells = {"batch": batch}
        for name, density, alike in (("whole", 1.0, False), ("half", 0.5, False), ("half_alike", 0.5, True)):
            with rig.engine(batch * (context + 600), pa=False, max_num_seqs=8) as engine:
                new = 400 if not rig.small else 40
                asked = [request(str(n), rig.ids(context, 70 if alike else 70 + n), new) for n in range(batch)]
                rigs.fill(engine, [dataclasses.replace(item, ce_density=density) for item in asked])
                seconds = rigs.decode_seconds(rig, engine, steps)
                part = _part_read(engine, experts)
            floor = _bytes(rig, batch, context, part) / limits["copy_bytes"]
            cell[name] = {
                "seconds": seconds, "part_read": part, "floor_seconds": floor, "of_limit": floor / seconds,
                "times_faster": cell["whole"]["seconds"] / seconds if "whole" in cell else 1.0,
            }  # fmt: skip
        cells[str(batch)] = cell
    return cells


def _layout(rig: Rig, experts: int) -> Layout:
    """Neurons as they are, in blocks: the weights are random already."""
    config = rig.model.module.config
    neurons = int(config.intermediate_size)
    bounds = torch.arange(0, neurons + 1, neurons // experts)
    one = LayerLayout(torch.arange(neurons), bounds, torch.ones(experts), 1.0)
    return Layout(dict.fromkeys(range(rig.model.num_layers), one), "none", "none", 0, "", {})


def _part_read(engine: Engine, experts: int) -> float:
    """The part of all experts that the running sequences' sets name together."""
    sets = [sequence.working_sets for sequence in engine.scheduler.running]
    if not all(sets):
        return 1.0
    chosen = [torch.stack([one[layer] for one in sets]).any(0).sum() for layer in sets[0]]
    return float(torch.stack(chosen).double().mean()) / experts


def _bytes(rig: Rig, batch: int, context: int, part: float) -> float:
    config = rig.model.module.config
    ffns = 3 * config.intermediate_size * config.hidden_size * config.num_hidden_layers * rig.model.dtype.itemsize
    return rig.decode_bytes([context] * batch) - (1.0 - part) * ffns
