"""Put Persistent Activity into a model, and take it out again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pacellm.errors import ConfigError, ModelError
from pacellm.memory.pool import BankShape
from pacellm.model.ffn import PersistentDown
from pacellm.model.neurons import FFN, ffns
from pacellm.model.ranks import Ranks


def patchable_layers(model: nn.Module) -> tuple[int, ...]:
    """Decoder layers with an FFN that every token passes; layers of routed experts alone have none.

    Raises:
        ModelError: a model that is not served.
    """
    return tuple(ffn.layer for ffn in ffns(model) if ffn is not None)


def patch(model: nn.Module, layers: Iterable[int], ranks: Ranks | None = None) -> list[BankShape]:
    """Give the FFNs of ``layers`` banks; the model computes the same until a step brings banks.

    Args:
        ranks: those that the model's layers are split over, if they are.

    Returns:
        The banks' sizes, one per patched layer.

    Raises:
        ConfigError: a layer that has no FFN of its own. ModelError: one that is patched already.
    """
    found, shapes = ffns(model), []
    for number in layers:
        ffn = found[number]
        if ffn is None:
            raise ConfigError(
                f"pa_layers names layer {number}, whose FFN is routed experts alone, so no bank would see every token",
                param="pa_layers",
            )
        if isinstance(ffn.down, PersistentDown):
            raise ModelError(f"layer {number} is already patched")
        own = ffn.inner if ranks is None else ranks.own_width(ffn)
        down = PersistentDown(ffn.down, number)
        down.is_split = own < ffn.inner
        setattr(ffn.module, ffn.layout.down, down)
        shapes.append(BankShape(number, own, ffn.hidden))
    return shapes


def is_split(ffn: FFN) -> bool:
    """Its banks' keys are spread over the ranks of a tensor-parallel model."""
    return isinstance(ffn.down, PersistentDown) and ffn.down.is_split


def unpatch(model: nn.Module) -> None:
    """Put the original projections back."""
    for ffn in ffns(model):
        if ffn is not None and isinstance(ffn.down, PersistentDown):
            setattr(ffn.module, ffn.layout.down, ffn.down.original)
