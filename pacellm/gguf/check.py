"""Which GGUF files are served. Needs the header alone, and no torch: others are refused before it loads.

A family stands here when tests/gguf/test_gguf.py holds for it: what a file says and is not known here might change
the model, so it is refused and named.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from pacellm.errors import ConfigError, ModelError
from pacellm.gguf.header import Header, find, read_header
from pacellm.model.families import REFUSED

# llama.cpp's architecture -> model type
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "llama": "llama",
    "nemotron": "nemotron",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
_OTHER_TYPES = {
    "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text", "gemma3n": "gemma3n_text", "granitehybrid":
    "granitemoehybrid", "lfm2moe": "lfm2_moe", "jamba": "jamba", "falcon-h1": "falcon_h1", "qwen3next": "qwen3_next",
    "nemotron_h": "nemotron_h", "gptneox": "gpt_neox", "rwkv6": "rwkv", "rwkv7": "rwkv",
}  # fmt: skip

# key below the architecture -> field of the config
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_INTEGERS = FIELDS.keys() - {"attn_logit_softcapping", "final_logit_softcapping"}
_NEEDED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
# for this one transformers would leave keys in llama.cpp's order where the number of their heads is not said
_NEEDED_TOO = {"llama": ("attention.head_count_kv",)}
_NORMS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_HEADS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_ROPE = ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length")  # fmt: skip
_IDLE = (
    "vocab_size",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "use_parallel_residual",
)  # told by tensors, or no matter
_KNOWN = frozenset((*FIELDS, *_NORMS, *_HEADS, *_ROPE, *_IDLE))
_ROPE_SCALINGS = (None, "none", "linear", "yarn")


class Split(NamedTuple):
    """How text is cut before a byte-level BPE's merges.

    Attributes:
        pattern: of the pieces; None is GPT-2's.
        has_single_digits: every digit is a piece of its own, before that.
        keeps_words: a piece that is a token is taken as one, whatever the merges say.
        adds_bos: where the file does not say.
    """

    pattern: str | None = None
    has_single_digits: bool = False
    keeps_words: bool = False
    adds_bos: bool = False


def _words(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2, _DIGITS, _QWEN2 = Split(), Split(has_single_digits=True), Split(_words(r"\p{N}"))
_LLAMA3 = Split(_words(r"\p{N}{1,3}"), keeps_words=True, adds_bos=True)
# tokenizer.ggml.pre of byte-level vocabularies
SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
}


def check_gguf(path: str | Path) -> Header | None:
    """The header of the GGUF file that a path means; None where it means something else.

    Raises:
        ModelError: a file that is damaged, or not served; says why. ConfigError: the package that reads it is missing.
    """
    file = find(path)
    if file is None:
        return None
    header = read_header(file)
    check_header(header)
    check_packages()
    return header


def check_packages() -> None:
    """Refuse to begin without what reads GGUF files.

    Raises:
        ConfigError: names the package and the extra.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"GGUF files need the package {package}: pip install 'pacellm[gguf]'", param="model")


def check_header(header: Header) -> None:
    """Refuse what would be served wrongly.

    Raises:
        ModelError: names what it is.
    """
    name = header.architecture
    if not name:
        raise ModelError(f"{header.file} names no general.architecture; it is not a model")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{header.file} is of architecture {name!r}, which is not served from GGUF files: {_why(name)}"
        )
    if int(header.metadata.get("split.count", 1)) > 1:
        raise ModelError(
            f"{header.file} is one part of {header.metadata['split.count']}; put them together first "
            f"(llama-gguf-split --merge)"
        )
    if "token_embd.weight" not in {tensor.name for tensor in header.tensors}:
        raise ModelError(f"{header.file} holds no weights of a language model (token_embd.weight)")
    _check_keys(header)
    _check_vocabulary(header)


def _why(name: str) -> str:
    model_type = _OTHER_TYPES.get(name, name)
    if model_type in REFUSED:
        return f"{REFUSED[model_type]} (docs/models.md)"
    return f"these are: {', '.join(ARCHITECTURES)}; serve its original checkpoint if docs/models.md has it"


def _check_keys(header: Header) -> None:
    begin, given = f"{header.architecture}.", header.own_keys
    if missing := [key for key in (*_NEEDED, *_NEEDED_TOO.get(header.architecture, ())) if key not in given]:
        raise ModelError(f"{header.file} lacks {begin}{missing[0]}")
    for key, value in given.items():
        _check_key(header, begin, key, value)
    if header.architecture in ("llama", "phi3") and given.get("expert_count"):
        raise ModelError(f"{header.file} has routed experts in an architecture ({header.architecture}) that is served "
                         f"dense; use its original checkpoint")  # fmt: skip
    has_factors = any("rope_factors_" in tensor.name for tensor in header.tensors)
    if has_factors or given.get("rope.scaling.type") not in _ROPE_SCALINGS:
        kind = given.get("rope.scaling.type", "longrope")
        raise ModelError(f"{header.file} lengthens its context by {kind!r}, which is not served (linear and yarn are)")


def _check_key(header: Header, begin: str, key: str, value: object) -> None:
    if key not in _KNOWN:
        raise ModelError(f"{header.file} sets {begin}{key} to {value!r}, which is not known here, so it is not served")
    values = value if isinstance(value, list) else [value]
    if not values or (key in _INTEGERS and not all(isinstance(one, int) and one >= 0 for one in values)):
        raise ModelError(f"{header.file} is damaged: {begin}{key} is {value!r}")
    if len(set(values)) > 1:
        raise ModelError(f"{header.file} sets {begin}{key} by layer, which is not served")


def _check_vocabulary(header: Header) -> None:
    data = header.metadata
    kind, tokens, types = (data.get(f"tokenizer.ggml.{name}") for name in ("model", "tokens", "token_type"))
    if not isinstance(tokens, list) or not tokens or kind not in ("gpt2", "llama"):
        raise ModelError(f"{header.file} has a tokenizer of kind {kind!r}; gpt2 (byte-level) and llama (sentencepiece) "
                         f"are read")  # fmt: skip
    if types is not None and len(types) != len(tokens):
        raise ModelError(f"{header.file} is damaged: {len(tokens):,} tokens have {len(types):,} types")
    _check_token_ids(header, len(tokens))
    split = data.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split not in SPLITS:
        raise ModelError(
            f"{header.file} cuts text by tokenizer.ggml.pre {split!r}, which is not known here; these are: "
            f"{', '.join(SPLITS)}"
        )


def _check_token_ids(header: Header, count: int) -> None:
    """Every token has an embedding, and those that mean something are tokens."""
    rows = next(tensor.shape for tensor in header.tensors if tensor.name == "token_embd.weight")
    if rows[0] != header.metadata[f"{header.architecture}.embedding_length"] or count > rows[-1]:
        raise ModelError(f"{header.file} is damaged: {count:,} tokens have embeddings of the shape {rows}")
    for name in ("bos", "eos", "eot", "eom", "padding", "unknown"):
        token = header.metadata.get(f"tokenizer.ggml.{name}_token_id", 0)
        if not isinstance(token, int) or not 0 <= token < count:
            raise ModelError(f"{header.file} is damaged: tokenizer.ggml.{name}_token_id is {token!r}")
