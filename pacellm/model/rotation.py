"""Rotary positions of stored keys: shown elsewhere than where they were stored, and precise far beyond the trained.

How a model rotates is not read from its code but found by trying: a token's key before any attention depends on its
position by the rotation alone, so keys of the same tokens at several positions tell which numbers of a head turn with
which, and by what angle. What does not fit is refused, so a family with a rotation of its own is never served wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pacellm.errors import ConfigError, ModelError
from pacellm.model.context import LayerProbe
from pacellm.model.load import LoadedModel, probe_layers

_TRIED = (0, 1, 37, 911)
_CLOSE = 2e-2  # of a key's largest number; a wrong layout is off by its size
_PARAM = "working_memory"


@dataclass(frozen=True)
class KeyRotation:
    """How the keys of one layer turn with their position.

    Attributes:
        frequencies: [R / 2] float64 radians a token.
        first: the first of the R numbers of a head that turn.
        pairs: numbers i and i + R / 2 turn together (``half``), or 2 i and 2 i + 1 (``adjacent``).
    """

    frequencies: Tensor
    first: int
    pairs: Literal["half", "adjacent"]

    def moved(self, keys: Tensor, by: int | Tensor) -> Tensor:
        """[.., n, D] stored keys as they would be ``by`` (a number, or [n]) positions further on."""
        steps = torch.as_tensor(by, dtype=torch.float64, device=keys.device)
        angles = steps[..., None] * self.frequencies.to(keys.device)
        cos, sin = angles.cos(), angles.sin()
        size = 2 * len(self.frequencies)
        part = keys[..., self.first : self.first + size]
        wide = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = cos.to(wide), sin.to(wide)
        if self.pairs == "half":
            one, two = part[..., : size // 2].to(wide), part[..., size // 2 :].to(wide)
            turned = torch.cat((one * cos - two * sin, two * cos + one * sin), -1)
        else:
            one, two = part[..., 0::2].to(wide), part[..., 1::2].to(wide)
            turned = torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2)
        moved = keys.clone()
        moved[..., self.first : self.first + size] = turned.to(keys.dtype)
        return moved


def learn_rotations(model: LoadedModel) -> list[KeyRotation | None]:
    """Each layer's rotation; None for layers whose keys do not depend on their position.

    Raises:
        ConfigError: the model's keys depend on their position in another way.
    """
    try:
        seen = {position: _keys_at(model, position) for position in _TRIED}
    except ModelError as error:
        raise ConfigError(f"working memory needs positions beyond the trained; {error}", param=_PARAM) from error
    frequencies = [found.double().cpu() for _, found in _frequencies(model.module)]
    return [
        _fitting(layer, {position: layers[layer] for position, layers in seen.items()}, frequencies)
        for layer in range(model.num_layers)
    ]


def _keys_at(model: LoadedModel, position: int) -> list[LayerProbe]:
    count = 8
    ids = torch.arange(1, count + 1, device=model.device) * (model.vocab_size // (count + 2))
    return probe_layers(model.module, ids, torch.full_like(ids, position))[0]


def _fitting(layer: int, seen: dict[int, LayerProbe], frequencies: list[Tensor]) -> KeyRotation | None:
    for special in seen[0].special:
        if special == "chunked attention":
            raise ConfigError(f"working memory is not there for models with {special}; leave it out", param=_PARAM)
    base = seen[0].key.float().cpu()
    others = {position: probe.key.float().cpu() for position, probe in seen.items()}
    if all(_is_close(key, base) for key in others.values()):
        return None
    for rotation in _known(frequencies, base.shape[-1]):
        if all(_is_close(key, rotation.moved(base, position)) for position, key in others.items()):
            return rotation
    raise ConfigError(
        f"working memory moves keys to other positions, and those of layer {layer} depend on theirs in no way that is "
        "known here (rotary, half or adjacent pairs); leave it out for this model",
        param=_PARAM,
    )


def _known(frequencies: list[Tensor], size: int) -> Iterator[KeyRotation]:
    """Ways in which keys of ``size`` may depend on their position."""
    for one in frequencies:
        beside = size - 2 * len(one)
        for first in sorted({0, beside}) if beside >= 0 else ():
            yield KeyRotation(one, first, "half")
            yield KeyRotation(one, first, "adjacent")


def _is_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _CLOSE * other.abs().max())


def _frequencies(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every set of rotary frequencies, with the module that holds it."""
    for owner in module.modules():
        for name, value in owner.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and value.ndim == 1:
                yield owner, value


# -- angles ------------------------------------------------------------------------------------------------


def make_precise(module: nn.Module, start: int) -> None:
    """Have positions from ``start`` on rotated by angles that are computed in float64: in float32 those of the fastest
    pair are off by 0.03 radians near a million. Earlier positions keep their bits.

    Raises:
        ConfigError: a rotary module gives something else than cosines and sines.
    """
    for owner in {id(owner): owner for owner, _ in _frequencies(module)}.values():
        forward: Any = owner.forward
        plain = forward.plain if isinstance(forward, PreciseAngles) else forward
        owner.forward = PreciseAngles(owner, plain, start)


class PreciseAngles:
    """A rotary module's forward.

    Args:
        owner: the module.
        plain: its own forward.
        start: the first position whose angles are computed here.
    """

    def __init__(self, owner: nn.Module, plain: Any, start: int) -> None:
        self._owner, self.plain, self._start = owner, plain, start
        self._forms: dict[str, str] = {}

    def __call__(self, hidden: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(cosines, sines) [B, T, R] as the module gives them."""
        found = self.plain(hidden, position_ids, *args, **kwargs)
        kind = kwargs.get("layer_type", args[0] if args else None)
        prefix = f"{kind}_" if kind is not None else ""
        form = self._form(hidden, prefix, args, kwargs)
        precise = self._computed(position_ids, prefix, form, found[0])
        is_far = (position_ids >= self._start)[..., None]
        cos, sin = (torch.where(is_far, new, old) for new, old in zip(precise, found, strict=True))
        return cos, sin

    def _form(self, hidden: Tensor, prefix: str, args: Any, kwargs: Any) -> str:
        """How a position's angles are laid out, tried out once."""
        if prefix not in self._forms:
            positions = torch.tensor([[0, 1, 5, 30]], device=hidden.device)
            wanted = self.plain(hidden[:1, :1].expand(1, 4, -1), positions, *args, **kwargs)
            for form in ("twice", "repeated", "once"):
                found = self._computed(positions, prefix, form, hidden)
                fits = isinstance(wanted, tuple) and all(
                    one.shape == other.shape and _is_close(one.float(), other.float())
                    for one, other in zip(found, wanted, strict=True)
                )
                if fits:
                    self._forms[prefix] = form
                    break
            else:
                raise ConfigError(
                    f"working memory needs angles beyond the trained positions, and {type(self._owner).__name__} gives "
                    "them in no form that is known here; leave it out for this model",
                    param=_PARAM,
                )
        return self._forms[prefix]

    def _computed(self, positions: Tensor, prefix: str, form: str, like: Tensor) -> tuple[Tensor, Tensor]:
        frequencies: Any = getattr(self._owner, f"{prefix}inv_freq")
        scale: Any = getattr(self._owner, f"{prefix}attention_scaling", 1.0)
        angles = positions[..., None].double() * frequencies.to(positions.device).double()
        if form == "twice":
            angles = torch.cat((angles, angles), -1)
        elif form == "repeated":
            angles = angles.repeat_interleave(2, -1)
        return (angles.cos() * scale).to(like.dtype), (angles.sin() * scale).to(like.dtype)
