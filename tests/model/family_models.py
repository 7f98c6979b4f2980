"""Tiny random models of every served family, with windows, chunks, sinks and odd KV shapes where it has them."""

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pacellm.model.families import FAMILIES

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "num_dense_layers": 2,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
WINDOW = {"sliding_window": 12}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}

EXTRAS = {
    "afmoe": {**MOE, **MIXED},
    "axk1": {**MOE, **MLA},
    "codegen": {"rotary_dim": 4, "n_inner": 48},
    "cohere2": MIXED,
    "cohere2_moe": {**MOE, **MIXED},
    "cwm": MIXED,
    "deepseek_v2": {**MOE, **MLA, "head_dim": None},
    "deepseek_v3": {**MOE, **MLA},
    "dots1": {**MOE, **MIXED},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_layer_start_index": 2, "moe_num_shared_experts": 1},
    "exaone4": MIXED,
    "exaone_moe": {**MOE, **MIXED},
    "flex_olmo": MOE,
    "flint": {**MOE, **MIXED, "shared_expert_intermediate_size": 40},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "gemma4_text": {**MIXED, "global_head_dim": 16, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    "glm4_moe": MOE,
    "glm4_moe_lite": {**MOE, **MLA},
    "gpt2": {"n_inner": 48},
    "gpt_bigcode": {"n_inner": 48},
    "gpt_oss": {**MOE, **MIXED},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "granite_swa": MIXED,
    "granitemoe": MOE,
    "granitemoe_swa": {**MOE, **MIXED},
    "granitemoeshared": {**MOE, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {**MOE, "moe_topk": 2},
    "hy_v3": MOE,
    "kolibri1": {**MOE, "shared_expert_intermediate_size": 40},
    "laguna": {**MOE, **MIXED, "shared_expert_intermediate_size": 40},
    "llama4_text": {
        **MOE,
        "intermediate_size_mlp": 40,
        "attention_chunk_size": 24,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1, 1],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "chunked_attention"],
        "floor_scale": 16,
    },
    "mellum": {**MOE, **MIXED},
    "mimo_v2_flash": {**MOE, **MIXED, "v_head_dim": 6, "swa_num_key_value_heads": 4, "swa_num_attention_heads": 4},
    "minicpm3": MLA,
    "minimax_m2": MOE,
    "ministral": MIXED,
    "ministral3": WINDOW,
    "mistral": WINDOW,
    "mixtral": {**MOE, **WINDOW},
    "modernbert-decoder": {"local_attention": 12, "global_attn_every_n_layers": 2},
    "olmo3": MIXED,
    "olmoe": MOE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": WINDOW,
    "phimoe": {**MOE, **WINDOW},
    "qwen2": {**MIXED, "use_sliding_window": True},
    "qwen2_moe": {**MOE, **MIXED, "use_sliding_window": True, "shared_expert_intermediate_size": 40,
                  "mlp_only_layers": [0]},
    "qwen3": {**MIXED, "use_sliding_window": True, "head_dim": 16},
    "qwen3_moe": {**MOE, **WINDOW, "use_sliding_window": True},
    "smollm3": {**MIXED, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1]},
    "solar_open": MOE,
    "starcoder2": WINDOW,
    "vaultgemma": MIXED,
    "youtu": MLA,
}  # fmt: skip

# under transformers 5.17 these do not take attention functions, and loading refuses them
TAUGHT_LATER = ("codegen", "gptj")
IS_OLD = Version(transformers.__version__) < Version("5.24")
# families that came to transformers after the oldest version that is supported are not there under that one
HERE = sorted(name for name in FAMILIES if name in CONFIG_MAPPING and not (IS_OLD and name in TAUGHT_LATER))


def tiny(model_type, seed=0, **changes):
    """A random model in float32 with plain attention; weights so large that every part tells."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**COMMON, **EXTRAS.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or name.endswith(("bias", "sinks")):
            parameter.data.normal_(0, 0.15)
    return model
