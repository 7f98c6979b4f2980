"""Checkpoint to module. Refuses what it cannot serve correctly: silent wrong output is the worst bug."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pacellm.errors import ModelError
from pacellm.model import attention, attention_cuda
from pacellm.model.context import KVShape, StepContext, step_context
from pacellm.model.families import family_of
from pacellm.model.patch import decoder_layers
from pacellm.model.ranks import Ranks

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for the engine.

    Attributes:
        module: the causal LM, in evaluation mode, with PaceLLM's attention.
        context_length: tokens its positions reach.
        vocab_size: rows of its logits.
        eos_token_ids: tokens that end an answer.
        kv_shapes: per layer ((kv heads, key size), (kv heads, value size)), as the model really produces them.
        dtype: of weights, KV and banks.
        device: where all of it lies.
        ranks: the tensor-parallel group that each layer is split over; ``kv_shapes`` are this rank's then.
    """

    module: nn.Module
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    kv_shapes: list[KVShape]
    dtype: torch.dtype
    device: torch.device
    ranks: Ranks | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.kv_shapes)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        numbers = sum(heads * size for shapes in self.kv_shapes for heads, size in shapes)
        return numbers * self.dtype.itemsize


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load a checkpoint from a directory or a hub name; safetensors only, no remote code.

    ``dtype`` "auto" is the checkpoint's own, but bfloat16 for float32 on CUDA, where attention takes no float32.

    Raises:
        ModelError: it cannot be read, or not be served correctly; says why.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_config(config)
        attention.register()
        module: nn.Module = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention.NAME, use_safetensors=True, trust_remote_code=False,
            **(ranks.loading(config) if ranks is not None else {}),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {path}: {error}") from error
    target = torch.device(device)
    if dtype == "auto" and target.type == "cuda" and next(module.parameters()).dtype == torch.float32:
        module.to(torch.bfloat16)  # as the kernel needs; where float32 is asked for, `prepare` refuses
    prepared = prepare(module if ranks is not None else module.to(target))
    return prepared if ranks is None else dataclasses.replace(prepared, ranks=ranks)


def prepare(module: nn.Module) -> LoadedModel:
    """Check a causal LM and make it ready; also for models built from a config.

    Raises:
        ModelError: it cannot be served correctly; says why.
    """
    config: PreTrainedConfig = module.config  # type: ignore[assignment]
    check_config(config)
    attention.register()
    module.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    if config._attn_implementation != attention.NAME:
        raise ModelError(f"{type(module).__name__} does not take attention functions")
    module.eval().requires_grad_(False)
    weight = next(module.parameters())
    kv_shapes = _probe(module, weight.device)
    if weight.device.type == "cuda":
        for (_, key_size), (_, value_size) in kv_shapes:
            if problem := attention_cuda.why_not(weight.dtype, key_size, value_size):
                raise ModelError(f"{problem}; use --dtype bfloat16 or --device cpu")
    return LoadedModel(
        module=module,
        context_length=context_length(config),
        vocab_size=int(config.vocab_size),
        eos_token_ids=eos_token_ids(module),
        kv_shapes=kv_shapes,
        dtype=weight.dtype,
        device=weight.device,
    )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what would be served wrongly.

    Raises:
        ModelError: names the part of the config.
    """
    family_of(config.model_type)
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise ModelError(f"layer types {sorted(strange)} are not served; only {sorted(_LAYER_TYPES)}")
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelError("attention soft-capping is not served")
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = (
        parameters.values() if parameters and all(isinstance(p, dict) for p in parameters.values()) else [parameters]
    )
    for rope in nested:
        kind = rope.get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise ModelError(
                f"rope type {kind!r} depends on the longest position in a batch and is not served; "
                f"these are: {', '.join(sorted(_ROPE_TYPES))}"
            )


def context_length(config: PreTrainedConfig) -> int:
    """Tokens that the model's positions reach."""
    return int(config.max_position_embeddings)


def eos_token_ids(module: nn.Module) -> frozenset[int]:
    """The tokens that end an answer, from the generation config and the config."""
    found: set[int] = set()
    for config in (getattr(module, "generation_config", None), module.config):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return frozenset(found)


def probe_step(model: LoadedModel, tokens: int) -> None:
    """A forward pass of ``tokens`` tokens in which attention returns zeros: for what else a step takes."""
    step = StepContext(chunks=[], keys=[], values=[], probe={})
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    last = torch.tensor([tokens - 1], device=model.device)
    with torch.inference_mode(), step_context(step):
        model.module(
            input_ids=ids,
            position_ids=torch.arange(tokens, device=model.device)[None],
            use_cache=False,
            logits_to_keep=last,
        )


def _probe(module: nn.Module, device: torch.device) -> list[KVShape]:
    """Each layer's KV shapes, seen in a forward pass of four tokens through PaceLLM's attention."""
    step = StepContext(chunks=[], keys=[], values=[], probe={})
    ids = torch.zeros(1, 4, dtype=torch.long, device=device)
    with torch.inference_mode(), step_context(step):
        module(input_ids=ids, position_ids=torch.arange(4, device=device)[None], use_cache=False)
    seen = step.probe or {}
    if sorted(seen) != list(range(len(decoder_layers(module)))):
        raise ModelError(f"{type(module).__name__} did not use PaceLLM's attention in every layer")
    return [seen[layer] for layer in sorted(seen)]
