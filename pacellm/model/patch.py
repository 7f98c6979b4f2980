"""Put Persistent Activity into a model, and take it out again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pacellm.errors import ModelError
from pacellm.memory.pool import BankShape
from pacellm.model.families import family_of, ffn_sizes
from pacellm.model.ffn import PersistentFFN
from pacellm.model.ranks import Ranks


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, in order.

    Raises:
        ModelError: a model without ``model.layers``.
    """
    base = getattr(model, "model", None)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "mlp") for layer in layers):
        raise ModelError(f"{type(model).__name__} has no model.layers[i].mlp; it cannot be patched")
    return layers


def patch(model: nn.Module, layers: Iterable[int], ranks: Ranks | None = None) -> list[BankShape]:
    """Replace the FFNs of ``layers`` by ones with banks; the model computes the same until a step brings banks.

    Args:
        ranks: those that the model's layers are split over, if they are.

    Returns:
        The banks' sizes, one per patched layer.

    Raises:
        ModelError: an FFN that cannot be patched, or is already.
    """
    layout = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
    decoder, shapes = decoder_layers(model), []
    for number in layers:
        layer = decoder[number]
        if isinstance(layer.mlp, PersistentFFN):
            raise ModelError(f"layer {number} is already patched")
        inner, hidden = ffn_sizes(layer.mlp, layout)  # type: ignore[arg-type]
        layer.mlp = PersistentFFN(layer.mlp, number, layout)  # type: ignore[arg-type]
        own = inner if ranks is None else ranks.own_width(layer.mlp, hidden)
        layer.mlp.is_split = own < inner
        shapes.append(BankShape(number, own, hidden))
    return shapes


def unpatch(model: nn.Module) -> None:
    """Put the original FFNs back."""
    for layer in decoder_layers(model):
        if isinstance(layer.mlp, PersistentFFN):
            layer.mlp = layer.mlp.original
