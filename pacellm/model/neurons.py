"""The FFN of a decoder layer that every token passes, and which parameters hold its neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from pacellm.errors import ModelError
from pacellm.model.families import FFN_LAYOUTS, Family, FFNLayout, family_of

Role = Literal["gate", "up", "down", "norm"]
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class NeuronAxis:
    """Where one parameter holds the neurons of an FFN.

    Neuron i is index ``start + i`` of dimension ``dim``; there are ``size`` of them. What is fused has two axes on one
    parameter: the gate's from 0, the up's from ``size``. Biases of gate and up are axes of their own; the bias of down
    has no neurons.
    """

    role: Role
    name: str
    parameter: nn.Parameter
    dim: int
    start: int
    size: int

    @property
    def view(self) -> Tensor:
        """The neurons' part of the parameter, in place."""
        return self.parameter.data.narrow(self.dim, self.start, self.size)


@dataclass(frozen=True)
class FFN:
    """The FFN of one decoder layer that every token passes: a dense one, or the shared experts beside routed ones.

    Attributes:
        layer: the decoder layer's number, counted from 0.
        module: what holds the projections; for some families the decoder layer itself.
        layout: the projections' names below ``module``.
        is_shared: routed experts stand beside it.
        inner: neurons F. hidden: H.
    """

    layer: int
    module: nn.Module
    layout: FFNLayout
    is_shared: bool
    inner: int
    hidden: int

    @property
    def down(self) -> nn.Module:
        """The projection out of the neurons; its input is x [.., F], its output y [.., H]."""
        return getattr(self.module, self.layout.down)

    def activation(self) -> Callable[[Tensor], Tensor]:
        """act of x = act(gate) * up, or of x = act(up).

        Raises:
            ModelError: the module has none under a known name.
        """
        for name in _ACTIVATIONS:
            if callable(found := getattr(self.module, name, None)):
                return found
        raise ModelError(f"{type(self.module).__name__} of layer {self.layer} has no activation under a known name")

    def axes(self) -> list[NeuronAxis]:
        """Every parameter that holds the neurons: permuting all of them alike changes outputs by rounding only.

        Raises:
            ModelError: a parameter that is stored in another way (quantised).
        """
        found: list[NeuronAxis] = []
        for role, name in (("gate", self.layout.gate), ("up", self.layout.up), ("down", self.layout.down)):
            if name is not None:
                found += self._axes_of(role, name)  # type: ignore[arg-type]
        if self.layout.norm is not None:
            norm = getattr(self.module, self.layout.norm)
            found += [
                NeuronAxis("norm", f"{self.layout.norm}.{name}", weight, 0, 0, self.inner)
                for name, weight in norm.named_parameters()
            ]
        return found

    def _axes_of(self, role: Role, name: str) -> list[NeuronAxis]:
        projection = original(getattr(self.module, name))
        parts: tuple[Role, ...] = ("gate", "up") if self.layout.fused and role == "up" else (role,)
        weight, bias = projection.weight, projection.bias
        shape, dim = ((self.hidden, self.inner), 1) if role == "down" else ((len(parts) * self.inner, self.hidden), 0)
        if not isinstance(projection, nn.Linear):  # Conv1D holds [in, out]
            shape, dim = shape[::-1], 1 - dim
        if tuple(weight.shape) != shape or not weight.is_floating_point():
            raise ModelError(
                f"{name} of layer {self.layer} holds {tuple(weight.shape)} {weight.dtype}, not {shape}: neurons of a "
                f"quantised model cannot be moved"
            )
        found = []
        for number, part in enumerate(parts):
            found.append(NeuronAxis(part, f"{name}.weight", weight, dim, number * self.inner, self.inner))
            if role != "down" and bias is not None:
                found.append(NeuronAxis(part, f"{name}.bias", bias, 0, number * self.inner, self.inner))
        return found


def original(module: nn.Module) -> Any:
    """A projection without what PaceLLM put around it."""
    return getattr(module, "original", module)


def ffn_of(layer: nn.Module, number: int, family: Family) -> FFN | None:
    """The FFN of a decoder layer that every token passes; None where all of it is routed experts.

    Raises:
        ModelError: the layer does not look like its family.
    """
    layout = FFN_LAYOUTS[family.layout]
    if family.norm is not None:
        layout = FFNLayout(layout.down, layout.up, layout.gate, layout.fused, family.norm)
    for path, is_shared in ((family.ffn, False), (family.shared, True)):
        module = None if path is None else _below(layer, path)
        if module is not None and _has_projections(module, layout):
            inner, hidden = _sizes(original(getattr(module, layout.down)))
            return FFN(number, module, layout, is_shared, inner, hidden)
    if family.routed and (module := _below(layer, family.ffn)) is not None and _has_experts(module):
        return None
    raise ModelError(
        f"layer {number} ({type(layer).__name__}) has no {family.ffn or 'projections'} with "
        f"{', '.join(layout.projections)}; its FFN is not understood"
    )


def _has_projections(module: nn.Module, layout: FFNLayout) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in layout.projections)


def ffns(model: nn.Module) -> list[FFN | None]:
    """:func:`ffn_of` every decoder layer, in order.

    Raises:
        ModelError: a model that is not served.
    """
    family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
    return [ffn_of(layer, number, family) for number, layer in enumerate(decoder_layers(model))]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, in order.

    Raises:
        ModelError: a model without them where its family has them.
    """
    path = family_of(model.config.model_type).layers  # type: ignore[union-attr,arg-type]
    layers = _below(model, path)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no {path}")
    return layers


def _below(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


def _sizes(down: Any) -> tuple[int, int]:
    if hasattr(down, "in_features"):
        return int(down.in_features), int(down.out_features)
    return int(down.nx), int(down.nf)  # Conv1D


def _has_experts(module: nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in module.parameters()) or hasattr(module, "experts")
