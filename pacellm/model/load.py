"""Checkpoint to module. Refuses what it cannot serve correctly: silent wrong output is the worst bug."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pacellm.errors import ConfigError, ModelError, PaceError
from pacellm.experts.layout import Layout
from pacellm.gguf.check import check_gguf
from pacellm.gguf.header import Header
from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.attention import dispatch as attention
from pacellm.model.attention.temperature import take_over
from pacellm.model.checkpoint import check_directory, check_head, check_loaded
from pacellm.model.context import KVShape, LayerProbe, StepContext, step_context
from pacellm.model.families import family_of
from pacellm.model.last_rows import keep_last_rows
from pacellm.model.neurons import decoder_layers, ffns
from pacellm.model.patch import patchable_layers
from pacellm.model.ranks import Ranks
from pacellm.model.retrieval import Retrieval
from pacellm.model.rope import check_rope, scale_rope

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for the engine.

    Attributes:
        module: the causal LM, in evaluation mode, with PaceLLM's attention.
        context_length: tokens its positions reach.
        vocab_size: rows of its logits.
        eos_token_ids: tokens that end an answer.
        kv_shapes: per layer ((kv heads, key size), (kv heads, value size)), as the model really produces them.
        query_heads: per layer, likewise.
        windows: per layer, tokens that a query sees, itself included; None is all.
        dtype: of activations, KV and banks.
        device: where all of it lies.
        patchable_layers: those whose FFN can have banks: all but layers of routed experts alone.
        ranks: the tensor-parallel group that each layer is split over; ``kv_shapes`` and ``query_heads`` are this
            rank's then.
        layout: the order that its FFN neurons were put into, None where they are as they came.
        retrieval: what indexes of working memory need of it; None where nobody has looked.
    """

    module: nn.Module
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    kv_shapes: list[KVShape]
    query_heads: list[int]
    windows: list[int | None]
    dtype: torch.dtype
    device: torch.device
    patchable_layers: tuple[int, ...] | None = None
    ranks: Ranks | None = None
    layout: Layout | None = None
    retrieval: Retrieval | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.kv_shapes)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        numbers = sum(heads * size for shapes in self.kv_shapes for heads, size in shapes)
        return numbers * self.dtype.itemsize


def find_device(name: str) -> str:
    """A device that is here; ``auto`` is CUDA where there is one.

    Raises:
        ConfigError: it is not here.
    """
    found = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if found else "cpu"
    known = {"cpu", *(["cuda"] if found else []), *(f"cuda:{number}" for number in range(found))}
    if name not in known:
        raise ConfigError(f"device {name!r} is not here; use one of {', '.join(sorted(known))}", param="device")
    return name


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    rope_scaling: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load a checkpoint from a directory or a hub name, or a GGUF file. Code of a checkpoint's own is never run.

    Args:
        path: directory, name on the hub, or GGUF file (or a directory that holds only one).
        dtype: "auto" is the checkpoint's own, but bfloat16 for float32 on CUDA, where attention takes no float32.
        device: where it shall lie.
        rope_scaling: lengthens the context (:func:`pacellm.model.rope.scale_rope`).
        allow_pickle: read weights that are not safetensors (tensors only, but from a format that can run code).
        ranks: split every layer over them; this process loads its part.

    Raises:
        ModelError: it cannot be read, or not be served correctly; says why. ConfigError: a wrong ``rope_scaling``.
    """
    header = check_gguf(path)
    if header is None:
        check_directory(path, allow_pickle=allow_pickle)
    elif ranks is not None:
        raise ModelError(f"{path} is a GGUF file, which is not split over processes; use `pacellm convert` first")
    with _named(path):
        if header is None:
            module = _from_directory(path, dtype, rope_scaling, allow_pickle, ranks)
        else:
            module = _from_gguf(header, dtype, rope_scaling)
    target = torch.device(device)
    if dtype == "auto" and target.type == "cuda" and next(module.parameters()).dtype == torch.float32:
        module.to(torch.bfloat16)  # as the kernel needs; where float32 is asked for, `prepare` refuses
    prepared = prepare(module if ranks is not None else module.to(target))
    return prepared if ranks is None else dataclasses.replace(prepared, ranks=ranks)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """What goes wrong with a checkpoint is an error that names it."""
    try:
        yield
    except PaceError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(_why_not_loaded(path, error)) from error


def _from_directory(
    path: str | Path,
    dtype: torch.dtype | str,
    rope_scaling: Mapping[str, Any] | None,
    allow_pickle: bool,
    ranks: Ranks | None,
) -> nn.Module:
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_head(config)
    _settle(config, rope_scaling)
    module: Any
    info: Any
    module, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attention.NAME,
        use_safetensors=None if allow_pickle else True,
        trust_remote_code=False,
        output_loading_info=True,
        **(ranks.loading(config) if ranks is not None else {}),
    )
    check_loaded(path, info)
    return module


def _from_gguf(header: Header, dtype: torch.dtype | str, rope_scaling: Mapping[str, Any] | None) -> nn.Module:
    from pacellm.gguf import read as gguf  # needs an optional package

    config = gguf.read_config(header)
    _settle(config, rope_scaling)
    if dtype == "auto":
        dtype = gguf.own_dtype(header)
    return gguf.read_model(header, config, dtype=dtype, attn_implementation=attention.NAME)


def _settle(config: PreTrainedConfig, rope_scaling: Mapping[str, Any] | None) -> None:
    """What is to be right with a config before its weights are read."""
    if rope_scaling is not None:
        scale_rope(config, rope_scaling)
    check_config(config)
    attention.register()


def _why_not_loaded(path: str | Path, error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text or "execute the configuration file" in text:
        return (
            f"cannot load {path}: it brings code of its own, which is never run here; save it with a model type that "
            f"transformers knows, or use another model (docs/models.md)"
        )
    if isinstance(error, ImportError):
        return f"cannot load {path}: a package is missing (quantised weights need their own): {text}"
    return f"cannot load {path}: {text}"


def prepare(module: nn.Module) -> LoadedModel:
    """Check a causal LM and make it ready; also for models built from a config.

    Raises:
        ModelError: it cannot be served correctly; says why.
    """
    config: PreTrainedConfig = module.config  # type: ignore[assignment]
    check_config(config)
    attention.register()
    try:
        module.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    except ValueError as error:
        raise ModelError(f"{type(module).__name__} does not take attention functions: {error}") from error
    if config._attn_implementation != attention.NAME:
        raise ModelError(f"{type(module).__name__} does not take attention functions")
    module.eval().requires_grad_(False)
    take_over(module)
    weight = module.get_input_embeddings().weight  # type: ignore[operator]
    if weight.dtype not in _DTYPES:
        raise ModelError(f"embeddings of {weight.dtype} are not served; use a checkpoint of float32, bfloat16, float16")
    ids = torch.zeros(4, dtype=torch.long, device=weight.device)
    probed, vocab_size = probe_layers(module, ids, torch.arange(4, device=weight.device))
    kv_shapes = [layer.shapes for layer in probed]
    last = ffns(module)[-1]
    if last is not None and last.module is not decoder_layers(module)[-1]:
        keep_last_rows(last.module, last.layer)
    if weight.device.type == "cuda":
        _check_cuda(weight.dtype, probed)
    return LoadedModel(
        module=module,
        context_length=context_length(config),
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids(module),
        kv_shapes=kv_shapes,
        query_heads=[layer.query_heads for layer in probed],
        windows=[layer.window for layer in probed],
        dtype=weight.dtype,
        device=weight.device,
        patchable_layers=patchable_layers(module),
    )


def _check_cuda(dtype: torch.dtype, probed: list[LayerProbe]) -> None:
    """Refuse what the CUDA kernels do not compute.

    Raises:
        ModelError: names it.
    """
    for layer in probed:
        (_, key_size), (_, value_size) = layer.shapes
        if layer.special:
            raise ModelError(f"{layer.special[0]} is served on a CPU only; use --device cpu")
        if problem := attention_cuda.why_not(dtype, key_size, value_size):
            raise ModelError(f"{problem}; use --dtype bfloat16 or --device cpu")


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what would be served wrongly.

    Raises:
        ModelError: names the part of the config.
    """
    family_of(config.model_type)
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise ModelError(
            f"layer types {sorted(strange)} are not served; only {sorted(_LAYER_TYPES)}: others keep a state beside "
            f"keys and values, which sessions here do not hold"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("encoder-decoder models are not served; use a decoder")
    check_rope(config)


def context_length(config: PreTrainedConfig) -> int:
    """Tokens that the model's positions reach.

    Raises:
        ModelError: the config does not say.
    """
    length = getattr(config, "max_position_embeddings", None)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ModelError(f"the config's max_position_embeddings is {length!r}, so the context's length is not known")
    return length


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


def probe_layers(module: nn.Module, ids: Tensor, positions: Tensor) -> tuple[list[LayerProbe], int]:
    """What each layer's attention works on, and the number of logits, seen in a forward pass of some tokens through
    PaceLLM's attention, which gives zeros: no token sees another.

    Args:
        ids, positions: [T] int64.

    Raises:
        ModelError: the module does not run, or not through PaceLLM's attention.
    """
    step = StepContext(chunks=[], keys=[], values=[], probe={})
    name = type(module).__name__
    kept = torch.zeros(1, dtype=torch.long, device=ids.device)
    try:
        with torch.inference_mode(), step_context(step):
            output = module(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=kept)
    except Exception as error:
        raise ModelError(f"{name} does not run here: {type(error).__name__}: {error}") from error
    seen = step.probe or {}
    if sorted(seen) != list(range(len(decoder_layers(module)))):
        raise ModelError(f"{name} did not use PaceLLM's attention in every layer")
    if output.logits.shape[1] != 1:
        raise ModelError(f"{name} computes logits of every token and cannot be asked for some (logits_to_keep)")
    return [seen[layer] for layer in sorted(seen)], int(output.logits.shape[-1])
