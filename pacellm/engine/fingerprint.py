"""What sessions depend on: a fingerprint of the model, the banks' config, the layout and the tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from pacellm.config import EngineConfig, Preset
from pacellm.model.load import LoadedModel
from pacellm.sessions.format import fingerprint


def fingerprint_of(model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None) -> str:
    """What sessions are only good with: weights, banks' config, tokenizer. The weights are hashed.

    How a turn mixed its banks is recorded in the log, so the preset is not part of it.
    """
    bank = dataclasses.asdict(config.bank)
    del bank["preset"]
    return fingerprint(_named_weights(model), _facts(model, config, tokenizer, bank))


def former_fingerprints(model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None) -> dict[str, Preset]:
    """The same as it was when the preset was part of it, for both presets that there were."""
    presets: tuple[Preset, ...] = ("reference", "paper") if config.pa else ()
    found: dict[str, Preset] = {}
    for preset in presets:
        bank = config.bank.of(preset)
        told = dataclasses.asdict(bank) | {"theta_high": bank.high, "theta_low": bank.low, "alpha": bank.mix}
        found[fingerprint(_named_weights(model), _facts(model, config, tokenizer, told))] = preset
    return found


def _facts(
    model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None, bank: dict[str, Any]
) -> dict[str, Any]:
    text = tokenizer.to_str() if tokenizer is not None else ""
    return {
        "pa": bank if config.pa else None,
        "pa_layers": config.pa_layers if config.pa else None,
        "layout": model.layout.digest if model.layout is not None else None,
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "kv_shapes": model.kv_shapes,
        "rope": getattr(model.module.config, "rope_parameters", None),
        "dtype": str(model.dtype),
    }


def _named_weights(model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    return ((name.replace(".original.", "."), weight) for name, weight in model.module.named_parameters())
