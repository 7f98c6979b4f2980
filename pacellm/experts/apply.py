"""A layout and a model: its fingerprint, what its neurons are clustered by, and the one time a layout is applied."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

from pacellm.errors import ConfigError
from pacellm.experts.cluster import Features
from pacellm.experts.layout import Layout
from pacellm.model.load import LoadedModel
from pacellm.model.neurons import NeuronAxis, ffns


def axes(module: nn.Module) -> dict[int, list[NeuronAxis]]:
    """By decoder layer every parameter that holds neurons of an FFN that every token passes.

    Raises:
        ModelError: an FFN that is not understood, or stored in another way (quantised).
    """
    return {ffn.layer: ffn.axes() for ffn in ffns(module) if ffn is not None}


def model_fingerprint(module: nn.Module) -> str:
    """What a layout is only good with: gates, or first projections, as bfloat16, so that --dtype does not matter."""
    digest = hashlib.sha256(str(module.config.model_type).encode())  # type: ignore[union-attr]
    for layer, found in axes(module).items():
        for axis in found:
            if axis.role == _first(found) and axis.view.ndim == 2:
                rounded = axis.view.to(torch.bfloat16).cpu().contiguous().view(torch.int16)
                digest.update(f"{layer} {list(rounded.shape)}".encode())
                numbers: Any = rounded.numpy()
                digest.update(numbers.tobytes())
    return digest.hexdigest()


def weight_features(module: nn.Module) -> dict[int, Features]:
    """Rows of the gate projection (the paper's choice); heat is the product of a neuron's weights' lengths."""
    found = {}
    for layer, own in axes(module).items():
        matrices = [axis for axis in own if axis.view.ndim == 2]
        first = next(axis for axis in matrices if axis.role == _first(own))
        points = (first.view.T if first.dim == 1 else first.view).float().cpu().contiguous()
        heat = torch.ones(len(points))
        for axis in matrices:
            heat *= torch.linalg.vector_norm(axis.view.float().cpu(), dim=1 - axis.dim)
        found[layer] = Features(points.clone(), heat)
    return found


def _first(found: list[NeuronAxis]) -> str:
    """The role whose weights say what a neuron looks for."""
    return "gate" if any(axis.role == "gate" for axis in found) else "up"


def apply_layout(model: LoadedModel, layout: Layout) -> LoadedModel:
    """Put every layer's neurons into the layout's order, in place: gate, up and down alike.

    Returns:
        The model with the layout on it.

    Raises:
        ConfigError: the layout is of another model, or the model has one already.
    """
    if model.layout is not None:
        raise ConfigError("the model has a layout already; load it again to apply another", param="ce_layout")
    found = axes(model.module)
    if layout.fingerprint != (here := model_fingerprint(model.module)):
        raise ConfigError(
            f"ce_layout was made for another model (fingerprint {layout.fingerprint[:12]}, here {here[:12]}); make one "
            "for this model with `pacellm cluster MODEL -o FILE`",
            param="ce_layout",
        )
    sizes = {layer: own[0].size for layer, own in found.items()}
    if sizes != {layer: one.num_neurons for layer, one in layout.layers.items()}:
        raise ConfigError("ce_layout has other layers or sizes than the model; make it again", param="ce_layout")
    for layer, own in found.items():
        for axis in own:
            order = layout.layers[layer].permutation.to(axis.view.device)
            axis.view.copy_(axis.view.index_select(axis.dim, order))
    return dataclasses.replace(model, layout=layout)
