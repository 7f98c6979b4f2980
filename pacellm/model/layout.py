"""A layout and a model: its fingerprint, what its neurons are clustered by, and the one time a layout is applied."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pacellm.errors import ConfigError, ModelError
from pacellm.experts.cluster import Features
from pacellm.experts.layout import Layout
from pacellm.model.families import family_of, ffn_sizes
from pacellm.model.load import LoadedModel
from pacellm.model.patch import decoder_layers

Role = Literal["gate", "up", "down"]


class Axis(NamedTuple):
    """Where a parameter holds an FFN's neurons: ``view`` is their part of it, in place, and ``dim`` their dimension."""

    role: Role
    view: Tensor
    dim: int


def axes(module: nn.Module) -> dict[int, list[Axis]]:
    """By decoder layer every parameter that holds neurons.

    Raises:
        ModelError: an FFN that is not understood, or stored in another way (quantised).
    """
    family = family_of(module.config.model_type)  # type: ignore[union-attr,arg-type]
    found = {}
    for number, layer in enumerate(decoder_layers(module)):
        mlp: Any = layer.mlp
        inner, _ = ffn_sizes(mlp, family)
        if family == "fused_gate_up":
            own = [Axis(role, _part(mlp.gate_up_proj.weight, start, inner), 0)
                   for role, start in (("gate", 0), ("up", inner))]  # fmt: skip
        else:
            own = [Axis("gate", mlp.gate_proj.weight.data, 0), Axis("up", mlp.up_proj.weight.data, 0)]
            own += [Axis(role, linear.bias.data, 0) for role, linear in (("gate", mlp.gate_proj), ("up", mlp.up_proj))
                    if linear.bias is not None]  # fmt: skip
        own.append(Axis("down", mlp.down_proj.weight.data, 1))
        for axis in own:
            if axis.view.shape[axis.dim] != inner or not axis.view.is_floating_point():
                raise ModelError(
                    f"layer {number} holds its neurons as {axis.view.dtype}: those of a quantised model cannot be moved"
                )
        found[number] = own
    return found


def _part(parameter: nn.Parameter, start: int, size: int) -> Tensor:
    return parameter.data.narrow(0, start, size)


def model_fingerprint(module: nn.Module) -> str:
    """What a layout is only good with: the gate projections, rounded to bfloat16 so that --dtype does not matter."""
    digest = hashlib.sha256(str(module.config.model_type).encode())  # type: ignore[union-attr]
    for layer, found in axes(module).items():
        for axis in found:
            if axis.role == "gate" and axis.view.ndim == 2:
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
        points = next(axis.view for axis in matrices if axis.role == "gate").float().cpu().contiguous()
        heat = torch.ones(len(points))
        for axis in matrices:
            heat *= torch.linalg.vector_norm(axis.view.float().cpu(), dim=1 - axis.dim)
        found[layer] = Features(points.clone(), heat)
    return found


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
    sizes = {layer: own[0].view.shape[0] for layer, own in found.items()}
    if sizes != {layer: one.num_neurons for layer, one in layout.layers.items()}:
        raise ConfigError("ce_layout has other layers or sizes than the model; make it again", param="ce_layout")
    for layer, own in found.items():
        for axis in own:
            order = layout.layers[layer].permutation.to(axis.view.device)
            axis.view.copy_(axis.view.index_select(axis.dim, order))
    return dataclasses.replace(model, layout=layout)
