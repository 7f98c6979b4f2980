"""Tiny GGUF files, written as llama.cpp's converter writes them (convert_hf_to_gguf.py), in float32."""

import gguf
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pacellm.gguf.check import ARCHITECTURES

TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|end|>",
    *"abcdefghijklmnopqrstuvwxyz0123456789.,?",
    "Ġ",
    "Ċ",
    "he",
    "Ġhe",
]
TEMPLATE = "{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}"
BASE = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NEAR = {"rope_type": "default", "rope_theta": 10000.0}
EXTRAS = {
    "gemma2": {"sliding_window": 12, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0,
               "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3": {"num_hidden_layers": 7, "sliding_window": 12, "query_pre_attn_scalar": 16, "tie_word_embeddings": True,
               "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                                   "sliding_attention": NEAR}},
    "nemotron": {"norm_eps": 1e-4, "rope_parameters": {**BASE["rope_parameters"], "partial_rotary_factor": 0.5}},
    "phi3": {"sliding_window": 12, "head_dim": 8},
    "qwen2": {"head_dim": 8},
    "qwen2moe": {**MOE, "head_dim": 8, "shared_expert_intermediate_size": 40},
    "qwen3moe": MOE | {"norm_topk_prob": True},
    "stablelm": {"head_dim": 8, "layer_norm_eps": 1e-4,
                 "rope_parameters": {**BASE["rope_parameters"], "partial_rotary_factor": 0.25}},
    "starcoder2": {"head_dim": 8, "norm_epsilon": 1e-4, "sliding_window": 12},
}  # fmt: skip
NORMS = {"nemotron": "norm_eps", "stablelm": "layer_norm_eps", "starcoder2": "norm_epsilon"}


def tiny(name, **changes):
    """A random model of a GGUF architecture, in which every number of its config tells."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[ARCHITECTURES[name]](**{**BASE, **EXTRAS.get(name, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15).add_(0.3 if parameter.ndim == 1 else 0.0)
    return model


def write(file, model, name, *, metadata=(), tensors=(), template=TEMPLATE, pre="gpt-2", pieces=None):
    """Write it.

    Args:
        pieces: scores of a sentencepiece vocabulary by token, in place of the byte-level one.
        metadata: pairs of a key below the architecture (or "tokenizer.") and a value, beside what belongs there.
        tensors: pairs of a name and a tensor, likewise.
    """
    writer = gguf.GGUFWriter(file, name)
    _keys(writer, model.config, name)
    for key, value in metadata:
        kinds = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        kinds[type(value)](key if key.startswith("tokenizer.") else f"{name}.{key}", value)
    if pieces is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 5))
        writer.add_token_merges(["h e", "Ġ he"])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(list(pieces))
        writer.add_token_scores(list(pieces.values()))
        writer.add_token_types([_type(token) for token in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    for key, tensor in [*_tensors(model, name), *tensors]:
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type(piece):
    if piece == "<unk>":
        return gguf.TokenType.UNKNOWN
    if piece.startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.CONTROL if piece.startswith("<") else gguf.TokenType.NORMAL


def _keys(writer, config, name):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    norm = getattr(config, NORMS.get(name, "rms_norm_eps"))
    (writer.add_layer_norm_eps if name in NORMS else writer.add_layer_norm_rms_eps)(norm)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if head != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head)
        writer.add_value_length(head)
    if name in ("llama", "phi3", "stablelm", "nemotron"):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if name in ("gemma2", "gemma3", "phi3", "starcoder2"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name.endswith("moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _tensors(model, name):
    """Names and tensors as they stand in the file."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if ".experts." in full:
            yield from _experts(full, tensor)
            continue
        stem, suffix = full.rsplit(".", 1)
        stored = names.get_name(stem)
        assert stored is not None, full
        yield f"{stored}.{suffix}", _changed(tensor, full, model.config, name)


def _experts(full, tensor):
    layer = full.split(".")[2]
    if full.endswith("down_proj"):
        yield f"blk.{layer}.ffn_down_exps.weight", tensor
        return
    for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
        yield f"blk.{layer}.ffn_{part}_exps.weight", half


def _changed(tensor, full, config, name):
    """What the converter does to a tensor's numbers."""
    if name == "llama" and ("q_proj" in full or "k_proj" in full):
        heads = config.num_attention_heads if "q_proj" in full else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if name in ("gemma2", "gemma3", "nemotron") and full.endswith("norm.weight"):
        return tensor + 1
    if full.endswith("shared_expert_gate.weight"):
        return tensor[0]
    return tensor
