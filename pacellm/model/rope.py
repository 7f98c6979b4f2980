"""Rotary positions: which kinds are served, and lengthening a model's context by a given scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from pacellm.errors import ConfigError, ModelError

# frequencies of these follow from the config alone; of others from the longest position in a call
SERVED = ("default", "linear", "llama3", "proportional", "yarn")
_ORIGINAL = "original_max_position_embeddings"
_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
_HELP = {
    "dynamic": """serve its native length with --rope-scaling '{"rope_type": "default"}'""",
    "longrope": "use a checkpoint whose context is not lengthened, or lengthened by yarn, linear or llama3 scaling",
}


def check_rope(config: PreTrainedConfig) -> None:
    """Refuse rotary positions that depend on what else is in a call.

    Raises:
        ModelError: names the kind, and what would help.
    """
    for rope in _parameters(config):
        kind = rope.get("rope_type") or "default"
        if kind not in SERVED:
            raise ModelError(
                f"rope type {kind!r} depends on the longest position in a batch and is not served; "
                f"{_HELP.get(kind, 'these are: ' + ', '.join(SERVED))}"
            )


def scale_rope(config: PreTrainedConfig, scaling: Mapping[str, Any]) -> None:
    """Put ``scaling`` into a config, in place: its context becomes ``factor`` times the native one.

    Args:
        scaling: as in a checkpoint's config: ``rope_type`` (yarn, linear, llama3 or default) and its fields.

    Raises:
        ConfigError: names the field.
    """
    kind, fields = _kind_and_fields(scaling)
    given = _only_parameters(config)
    native = _native_length(config, given, fields)
    factor = _factor(kind, fields)
    if kind == "llama3" and not {"low_freq_factor", "high_freq_factor"} <= fields.keys():
        raise _wrong("llama3 needs low_freq_factor and high_freq_factor")
    kept: dict[str, Any] = {name: given[name] for name in ("rope_theta", "partial_rotary_factor") if name in given}
    if kind in ("yarn", "llama3"):
        kept[_ORIGINAL] = native
    config.rope_parameters = {**kept, "rope_type": kind, **fields}
    config.max_position_embeddings = int(native * factor)


def _kind_and_fields(scaling: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _FIELDS:
        raise _wrong(f"rope_type must be one of {', '.join(sorted(_FIELDS))}, not {kind!r}")
    fields = {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
    if unknown := sorted(fields.keys() - set(_FIELDS[kind])):
        raise _wrong(f"{kind} has no field {unknown[0]!r}; it has {', '.join(_FIELDS[kind]) or 'none'}")
    return kind, fields


def _only_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope parameters of a model that has the same ones in all layers."""
    found = list(_parameters(config))
    if len(found) != 1 or not found[0].get("rope_theta"):
        raise _wrong(f"model type {config.model_type!r} has no rotary positions, or other ones by layer")
    return found[0]


def _native_length(config: PreTrainedConfig, given: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    """Tokens that the model was trained on."""
    native = fields.get(_ORIGINAL) or given.get(_ORIGINAL) or config.max_position_embeddings
    if isinstance(native, bool) or not isinstance(native, int) or native < 1:
        raise _wrong(f"{_ORIGINAL} must be an integer above 0, not {native!r}")
    return native


def _factor(kind: str, fields: Mapping[str, Any]) -> float:
    factor = fields.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1.0 <= factor <= 1024.0:
        raise _wrong(f"factor must be a number from 1 to 1024, not {factor!r}")
    if kind != "default" and "factor" not in fields:
        raise _wrong(f"{kind} needs a factor, as in {{'rope_type': '{kind}', 'factor': 4.0}}")
    return factor


def _parameters(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rope parameters, by layer type where there are several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    yield from nested if nested else ([parameters] if parameters else [])


def _wrong(message: str) -> ConfigError:
    return ConfigError(f"rope scaling: {message}", param="rope_scaling")
