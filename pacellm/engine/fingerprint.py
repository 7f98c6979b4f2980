"""Fingerprints: of what sessions depend on, and of what an answer does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pacellm.config import EngineConfig, Preset
from pacellm.model.fingerprint import model_sample
from pacellm.model.load import LoadedModel
from pacellm.sessions.format import fingerprint

_TELLING = (
    "pa", "pa_layers", "bank", "ce_density", "exact_products", "deterministic", "attention_kernel", "cuda_graphs",
    "working_memory", "working_memory_window", "working_memory_index", "working_memory_block", "working_memory_recall",
)  # fmt: skip
"""Of the config, what an answer's numbers depend on."""


def fingerprint_of(model: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None) -> str:
    """What sessions are only good with: weights, banks' config, tokenizer. The weights are hashed.

    How a turn mixed its banks is recorded in the log, so the preset is not part of it.
    """
    bank = dataclasses.asdict(config.bank)
    del bank["preset"]
    return fingerprint(_named_weights(model), _facts(model, config, tokenizer, bank))


def system_fingerprint(model: LoadedModel, config: EngineConfig, version: str) -> str:
    """``fp_`` and ten hex digits: where it is the same, the same request with a seed has the same answer.

    Args:
        version: of this package.
    """
    facts = {
        "versions": (version, torch.__version__),
        "weights": model_sample(model.module),
        "layout": model.layout.digest if model.layout is not None else None,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "config": {name: getattr(config, name) for name in _TELLING},
        "dtype": str(model.dtype),
    }
    return f"fp_{hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:10]}"


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
