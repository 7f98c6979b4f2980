"""What is measured of a model, and in which order: every layer alone, then layers together, then densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pacellm.calibration.file import (
    ACTING,
    HARMLESS,
    WORST,
    Acting,
    BankSection,
    BankSet,
    Density,
    Effect,
    Effects,
    ExpertSection,
    Perplexity,
)
from pacellm.calibration.gate import LIMIT
from pacellm.calibration.perplexity import Meter, Scores
from pacellm.config import PAConfig
from pacellm.model.load import LoadedModel

PART = 720
"""Tokens of the text that single layers are measured on."""
STRIDE = 2
"""Every so many of those are scored."""
MAX_TOKENS = 4096
MOST = 8
"""Layers that ``--pa-layers auto`` takes at most: each costs a session memory and a decoded token time."""
DENSITIES = (0.75, 0.5)
_BLOCK = 32  # neighbouring tokens' scores are not independent: intervals are those of means over so many
Begin = Callable[[str], None]
Keep = Callable[[BankSection], None]


def effect(form: Tensor, plain: Tensor) -> Effect:
    """Of scores [n] of the same n tokens, in nats."""
    change = form - plain
    mean = float(change.mean())
    blocks = torch.stack([block.mean() for block in change.split(_BLOCK)])
    error = float(blocks.std()) / math.sqrt(len(blocks)) if len(blocks) > 1 else 0.0
    low, ratio, high = (_factor(mean + sign * 1.96 * error) for sign in (-1, 0, 1))
    return Effect(ratio=ratio, low=low, high=high, tokens=len(change))


def effects(form: Scores, plain: Scores) -> Effects:
    """Of one form beside the plain model."""
    prompt = effect(form.prompt, plain.prompt) if len(form.prompt) else None
    return Effects(prompt=prompt, decoded=effect(form.decoded, plain.decoded))


def perplexity(scores: Scores) -> Perplexity:
    """Of the plain model."""
    return Perplexity(prompt=_factor(float(scores.prompt.mean())), decoded=_factor(float(scores.decoded.mean())))


def _factor(nats: float) -> float:
    """exp, with five digits; what is too large, or no number, is ``WORST``."""
    return float(f"{math.exp(nats):.5g}") if nats < math.log(WORST) else WORST


class BankMeasurement:
    """Measures a model's banks.

    Args:
        meter: has read the plain text.
        bank: their size and segment; its preset does not matter.
        layers: those that can have banks.
        known: what was measured before, which is not measured again.
        begin: told what comes next.
        keep: given what is known, whenever there is more.
    """

    def __init__(
        self,
        meter: Meter,
        bank: PAConfig,
        layers: Sequence[int],
        known: BankSection | None,
        *,
        begin: Begin = lambda name: None,
        keep: Keep = lambda section: None,
    ) -> None:
        self._meter, self._layers, self._begin, self._keep = meter, layers, begin, keep
        self._configs: dict[Acting, PAConfig] = {preset: bank.of(preset) for preset in ACTING}
        self._part = min(PART, meter.plan().length)
        self.section = known or BankSection(bank_size=bank.bank_size, segment=bank.segment, layers={}, sets=[], auto={})

    def cost(self, sets: Iterable[Sequence[int]]) -> float:
        """Work to come, in the meter's unit, as far as it is known: ``auto`` is taken for the first layers."""
        work = 0.0
        for preset in ACTING:
            missing = [layer for layer in self._layers if str(layer) not in self.section.alone(preset)]
            work += sum(self._meter.banks_cost([layer], self._part, STRIDE) for layer in missing)
            wanted = [layers for layers in sets if self.section.of(preset, layers) is None]
            wanted += [] if preset in self.section.auto else [self._layers[:MOST]]
            work += sum(self._meter.banks_cost(layers) for layers in wanted)
        return work

    def run(self, sets: Iterable[Sequence[int]]) -> BankSection:
        """Measure every layer, ``sets`` of them, and those that ``--pa-layers auto`` takes."""
        for number, layer in enumerate(self._layers):
            self._begin(f"layer {layer} ({number + 1} of {len(self._layers)})")
            self._measure_layer(layer)
        for preset in ACTING:
            for layers in sets:
                self._together(preset, layers)
            if preset not in self.section.auto:
                self._choose(preset)
        return self.section

    def _measure_layer(self, layer: int) -> None:
        for preset, config in self._configs.items():
            known = self.section.alone(preset)
            if str(layer) not in known:
                form = self._meter.banks(config, [layer], self._part, STRIDE)
                known = {**known, str(layer): effects(form, self._meter.plain(self._part, STRIDE))}
                self._update(layers={**self.section.layers, preset: known})

    def _choose(self, preset: Acting) -> None:
        """Harmless layers, evenly spread over those there are, halved until together they do no harm either."""
        alone = self.section.alone(preset)
        found = [layer for layer in self._layers if alone[str(layer)].worst <= HARMLESS]
        count = min(len(found), MOST)
        spread = [found[(2 * number + 1) * len(found) // (2 * count)] for number in range(count)]
        chosen = sorted(spread, key=lambda layer: (alone[str(layer)].worst, layer))
        while chosen and self._together(preset, sorted(chosen)).worst > LIMIT:
            chosen = chosen[: len(chosen) // 2]
        self._update(auto={**self.section.auto, preset: sorted(chosen)})

    def _together(self, preset: Acting, layers: Sequence[int]) -> Effects:
        """On the whole text, once."""
        wanted = sorted(layers)
        for one in self.section.sets:
            if one.preset == preset and one.layers == wanted:
                return one.effects
        self._begin(f"{preset} in layers {','.join(map(str, wanted))}")
        found = effects(self._meter.banks(self._configs[preset], wanted), self._meter.plain())
        self._update(sets=[*self.section.sets, BankSet(preset=preset, layers=wanted, effects=found)])
        return found

    def _update(self, **changes: object) -> None:
        self.section = self.section.model_copy(update=changes)
        self._keep(self.section)


def measure_experts(meter: Meter, model: LoadedModel, begin: Begin = lambda name: None) -> ExpertSection:
    """What decoded tokens with fewer experts do.

    Args:
        meter: of the same model; it measures nothing after this.
        model: with its layout.
    """
    assert model.layout is not None
    begin(f"densities {', '.join(f'{density:g}' for density in DENSITIES)}")
    plain = replace(meter.plain(), prompt=torch.empty(0))
    forms = meter.densities(model, DENSITIES)
    found = [
        Density(density=density, effects=effects(form, plain)) for density, form in zip(DENSITIES, forms, strict=True)
    ]
    return ExpertSection(layout=model.layout.digest, densities=found)
