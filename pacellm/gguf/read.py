"""Models in GGUF files. Weights and vocabulary come through transformers' reader, dequantised; the config is made here
from the file's own keys, of which that reader leaves out some that change the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from pacellm.errors import ModelError, PaceError
from pacellm.gguf.check import ARCHITECTURES, FIELDS, SPLITS
from pacellm.gguf.header import Header
from pacellm.model.checkpoint import check_loaded

_NORM_FIELDS = {"nemotron": "norm_eps", "stablelm": "layer_norm_eps", "starcoder2": "norm_epsilon"}
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B models, which scale by another size
# turns end with these too, whatever the file's eos is (llama.cpp's list)
_ENDS = frozenset(("<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<EOT>"))
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_F32, _F16, _BF16 = 0, 1, 30  # of tensors
_LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@contextmanager
def alone(header: Header) -> Iterator[tuple[str, str]]:
    """A directory with nothing in it but the file, and its name there: transformers reads what lies beside it."""
    with tempfile.TemporaryDirectory(prefix="pacellm-gguf-") as place:
        (Path(place) / "model.gguf").symlink_to(header.file.resolve())
        yield place, "model.gguf"


def read_config(header: Header) -> PreTrainedConfig:
    """The config that a file's keys describe.

    Raises:
        ModelError: they do not fit together.
    """
    kind = ARCHITECTURES[header.architecture]
    given = {key: _one(value) for key, value in header.own_keys.items()}
    fields: dict[str, Any] = {FIELDS[key]: value for key, value in given.items() if key in FIELDS}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    head = given.get("attention.key_length") or fields["hidden_size"] // fields["num_attention_heads"]
    if given.get("attention.value_length", head) != head:
        raise ModelError(f"{header.file} has keys of {head} and values of {given['attention.value_length']} numbers")
    norm = given.get("attention.layer_norm_rms_epsilon", given.get("attention.layer_norm_epsilon"))
    if norm is not None:
        fields[_NORM_FIELDS.get(kind, "rms_norm_eps")] = norm
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    fields |= {
        "head_dim": head,
        "rope_parameters": _rope(header, given, head),
        "vocab_size": shapes["token_embd.weight"][1],
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    fields |= _own_fields(kind, fields, head, shapes.keys())
    for name in ("bos", "eos"):
        fields[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    fields["pad_token_id"] = header.metadata.get("tokenizer.ggml.padding_token_id")
    return AutoConfig.for_model(kind, **fields)


def _own_fields(kind: str, fields: dict[str, Any], head: int, tensors: Set[str]) -> dict[str, Any]:
    """What only one kind of model has, told by its size and the names of its tensors."""
    if kind in _LARGEST_GEMMA:
        is_largest = fields["num_hidden_layers"] == _LARGEST_GEMMA[kind]
        width = fields["hidden_size"] // fields["num_attention_heads"] if is_largest else head
        return {"query_pre_attn_scalar": width}
    if kind == "qwen3_moe":
        return {"norm_topk_prob": True}  # as llama.cpp always has it
    if kind == "stablelm":
        return {
            "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        }
    return {}


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _rope(header: Header, given: dict[str, Any], head: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": given.get("rope.freq_base", 10000.0)}
    if (rotated := given.get("rope.dimension_count", head)) != head:
        rope["partial_rotary_factor"] = rotated / head
    if (scaling := given.get("rope.scaling.type")) in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": given["rope.scaling.factor"]}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = given["rope.scaling.original_context_length"]
    if any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        rope |= _llama3(header, rope["rope_theta"], rotated)
    if ARCHITECTURES[header.architecture] != "gemma3_text":
        return rope
    near = {"rope_type": "default", "rope_theta": given.get("rope.freq_base_swa", 10000.0)}
    return {"full_attention": rope, "sliding_attention": near}


def _llama3(header: Header, theta: float, size: int) -> dict[str, Any]:
    """Llama 3's scaling from the divisors of frequencies, which is all that a file keeps of it.

    Raises:
        ModelError: they are not those of the scaling that Llama 3 models have.
    """
    tensor = next(tensor for tensor in GGUFReader(header.file).tensors if tensor.name == "rope_freqs.weight")
    found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).flatten().double()
    factor, native = float(found.max()), float(_LLAMA3_BANDS["original_max_position_embeddings"])
    turns = native * theta ** (-torch.arange(0, size, 2, dtype=torch.double) / size) / (2 * torch.pi)
    low, high = _LLAMA3_BANDS["low_freq_factor"], _LLAMA3_BANDS["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ModelError(f"{header.file} scales rotary positions (rope_freqs.weight) as no model known here does")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_BANDS}


def ends(header: Header) -> list[int]:
    """Tokens that end an answer."""
    data = header.metadata
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    tokens = data["tokenizer.ggml.tokens"]
    found = {number for number in _marked(header) if tokens[number] in _ENDS}
    return sorted(found | {int(data[key]) for key in keys if key in data})


def _marked(header: Header) -> Iterator[int]:
    """Tokens that are none of ordinary text."""
    for number, kind in enumerate(header.metadata.get("tokenizer.ggml.token_type") or ()):
        if kind in (_CONTROL, _USER_DEFINED):
            yield number


def read_model(header: Header, config: PreTrainedConfig, **options: Any) -> nn.Module:
    """The causal LM, dequantised a tensor at a time.

    Args:
        config: from :func:`read_config`.
        options: for ``from_pretrained``.

    Raises:
        ModelError: the model has weights that the file has not, or the other way round.
    """
    module: Any
    info: Any
    with alone(header) as (place, name):
        module, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            place, gguf_file=name, config=config, output_loading_info=True, **options
        )
    check_loaded(header.file, info)
    # tensors that transformers knows no place for are left out in silence
    held = sum(tensor.size for tensor in header.tensors if tensor.name != "rope_freqs.weight")
    if (read := sum(parameter.numel() for parameter in module.parameters())) != held:
        raise ModelError(
            f"{header.file} holds {held:,} numbers, of which the model takes {read:,}; "
            f"it has parts that are not known here"
        )
    module.hf_quantizer = None  # it was read as quantised, and is not any more
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id, eos_token_id=ends(header)
    )
    return module


def read_tokenizer(header: Header) -> PreTrainedTokenizerFast:
    """The tokenizer, with the file's chat template.

    Raises:
        ModelError: a token that shall stay whole does not.
    """
    data = header.metadata
    with alone(header) as (place, name):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place, gguf_file=name)
    backend: Tokenizer = tokenizer.backend_tokenizer
    adds_bos = data["tokenizer.ggml.model"] == "llama"
    if data["tokenizer.ggml.model"] == "gpt2":
        split = SPLITS[data["tokenizer.ggml.pre"]]
        adds_bos = split.adds_bos
        _cut(backend, data["tokenizer.ggml.pre"])
    elif not header.architecture.startswith("gemma"):
        _mark_spaces(backend, has_prefix=bool(data.get("tokenizer.ggml.add_space_prefix", True)))
    tokenizer.add_bos_token = bool(data.get("tokenizer.ggml.add_bos_token", adds_bos))
    tokenizer.add_eos_token = bool(data.get("tokenizer.ggml.add_eos_token", False))
    _check_whole(header, tokenizer)
    return tokenizer


def _cut(backend: Tokenizer, name: str) -> None:
    """Cut text as the vocabulary was made."""
    split = SPLITS[name]
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.has_single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    if split.keeps_words:
        backend.model.ignore_merges = True


def _mark_spaces(backend: Tokenizer, *, has_prefix: bool) -> None:
    """Spaces as sentencepiece has them. With ``has_prefix`` one stands before a text, and before what follows a special
    token, whatever it begins with; transformers puts none before a space."""
    space = [normalizers.Prepend("▁")] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _check_whole(header: Header, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a vocabulary of which a token that structures prompts would be cut into pieces.

    Raises:
        ModelError: names the token.
    """
    data, backend = header.metadata, tokenizer.backend_tokenizer
    tokens, template = data["tokenizer.ggml.tokens"], data.get("tokenizer.chat_template") or ""
    for number in {*ends(header), *(number for number in _marked(header) if tokens[number] in template)}:
        ids = backend.encode(tokens[number], add_special_tokens=False).ids
        if ids != [number]:
            raise ModelError(
                f"the tokenizer of {header.file} cannot be made: {tokens[number]!r} is token {number}, "
                f"but would be read as {ids}"
            )


def own_dtype(header: Header) -> torch.dtype:
    """The type that weights have in the file; float32 where they are quantised."""
    kinds = {tensor.kind for tensor in header.tensors} - {_F32}
    return {frozenset((_F16,)): torch.float16, frozenset((_BF16,)): torch.bfloat16}.get(frozenset(kinds), torch.float32)


def convert(header: Header, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an ordinary checkpoint of a GGUF file; the directory appears whole or not at all.

    Args:
        header: of a file that was checked (:func:`pacellm.gguf.check.check_gguf`).
        directory: must not be there yet, or be empty.
        dtype: of the weights.

    Raises:
        ModelError: the file cannot be read, or the directory not be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ModelError(f"{directory} is there already; give another place, or move it away")
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as place:
            made = Path(place) / "checkpoint"
            read_model(header, read_config(header), dtype=dtype).save_pretrained(made)  # type: ignore[operator]
            read_tokenizer(header).save_pretrained(made)
            for written in made.iterdir():
                written.chmod(0o644)
            made.rename(directory)
    except PaceError:
        raise
    except OSError as error:
        raise ModelError(f"{directory} cannot be written: {error}") from error
    except (ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{header.file} cannot be converted: {error}") from error
