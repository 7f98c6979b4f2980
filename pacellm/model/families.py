"""Which architectures are served, how the FFNs of each are laid out, and why others are refused.

A family is served when its row in tests/model/test_families.py holds. Others are refused when they are loaded: a wrong
guess would be silent. docs/models.md is this table in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pacellm.errors import ModelError

FFNLayoutName = Literal[
    "gate_up_down",
    "fused_gate_up",
    "up_down",
    "fc1_fc2",
    "c_fc_c_proj",
    "h_to_4h",
    "fc_in_out",
    "wi_wo",
    "input_output",
]


@dataclass(frozen=True)
class FFNLayout:
    """How one FFN is laid out. Names are of modules below the one that holds the FFN.

    Attributes:
        down: the projection out of the neurons.
        up: the projection into the neurons; where ``fused`` is set it holds the gate's rows, then the up's.
        gate: the gate's projection; None where there is none, or where it is part of ``up``.
        fused: gate and up are one projection of 2 F rows.
        norm: a norm over the neurons, between them and ``down``.
    """

    down: str
    up: str
    gate: str | None = None
    fused: bool = False
    norm: str | None = None

    @property
    def is_gated(self) -> bool:
        """x = act(gate) * up, not act(up)."""
        return self.gate is not None or self.fused

    @property
    def projections(self) -> tuple[str, ...]:
        """Names that a module of this layout has."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)


FFN_LAYOUTS: dict[FFNLayoutName, FFNLayout] = {
    "gate_up_down": FFNLayout(gate="gate_proj", up="up_proj", down="down_proj"),
    "fused_gate_up": FFNLayout(up="gate_up_proj", down="down_proj", fused=True),
    "up_down": FFNLayout(up="up_proj", down="down_proj"),
    "fc1_fc2": FFNLayout(up="fc1", down="fc2"),
    "c_fc_c_proj": FFNLayout(up="c_fc", down="c_proj"),
    "h_to_4h": FFNLayout(up="dense_h_to_4h", down="dense_4h_to_h"),
    "fc_in_out": FFNLayout(up="fc_in", down="fc_out"),
    "wi_wo": FFNLayout(up="Wi", down="Wo", fused=True),
    "input_output": FFNLayout(up="input_linear", down="output_linear", fused=True),
}


@dataclass(frozen=True)
class Family:
    """One architecture, by its ``model_type``.

    Attributes:
        layout: of its dense FFNs, and of what ``shared`` names.
        ffn: the FFN's module below a decoder layer; "" where the projections are the layer's own.
        layers: the decoder layers below the causal LM.
        shared: in layers of routed experts the FFN that every token passes, below a decoder layer. None: such
            layers have none.
        norm: a norm over the neurons, before ``down``.
        routed: it has layers of routed experts.
        window_in_mask: a sliding window that the model tells its mask but not its attention function.
    """

    layout: FFNLayoutName = "gate_up_down"
    ffn: str = "mlp"
    layers: str = "model.layers"
    shared: str | None = None
    norm: str | None = None
    routed: bool = False
    window_in_mask: bool = False


_DENSE = Family()
_PLAIN = Family("up_down")
_FUSED = Family("fused_gate_up")
_ROUTED = Family(routed=True)
_SHARED_EXPERTS = Family(shared="mlp.shared_experts", routed=True)
_SHARED_EXPERT = Family(shared="mlp.shared_expert", routed=True)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("bitnet", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text",
         "granite", "granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "llama", "minicpm3", "ministral",
         "ministral3", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
         "vaultgemma", "youtu"), _DENSE),
    **dict.fromkeys(("apertus", "arcee", "jais2", "nemotron"), _PLAIN),
    **dict.fromkeys(("glm", "glm4", "phi3"), _FUSED),
    **dict.fromkeys(
        ("cohere2_moe", "flex_olmo", "gpt_oss", "mellum", "mimo_v2_flash", "minimax_m2", "mixtral", "olmoe",
         "qwen3_moe"), _ROUTED),
    **dict.fromkeys(
        ("afmoe", "axk1", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe",
         "glm4_moe_lite", "hy_v3", "kolibri1", "laguna", "solar_open"), _SHARED_EXPERTS),
    "flint": _SHARED_EXPERT,
    "qwen2_moe": Family(shared="mlp.shared_expert", routed=True, window_in_mask=True),
    "bitnet": Family(norm="ffn_sub_norm"),
    "biogpt": Family("fc1_fc2", ffn="", layers="biogpt.layers"),
    "codegen": Family("fc_in_out", layers="transformer.h"),
    "gpt2": Family("c_fc_c_proj", layers="transformer.h"),
    "gpt_bigcode": Family("c_fc_c_proj", layers="transformer.h"),
    "gpt_neox": Family("h_to_4h", layers="gpt_neox.layers"),
    "gptj": Family("fc_in_out", layers="transformer.h"),
    "granitemoe": Family(ffn="block_sparse_moe", routed=True),
    "granitemoe_swa": Family(ffn="block_sparse_moe", routed=True),
    "granitemoeshared": Family("input_output", ffn="block_sparse_moe", shared="shared_mlp", routed=True),
    "hunyuan_v1_moe": Family(shared="mlp.shared_mlp", routed=True),
    "llama4_text": Family(ffn="feed_forward", shared="feed_forward.shared_expert", routed=True),
    "modernbert-decoder": Family("wi_wo"),
    "opt": Family("fc1_fc2", ffn="", layers="model.decoder.layers"),
    "persimmon": Family("h_to_4h"),
    "phi": Family("fc1_fc2"),
    "nanochat": Family("fc1_fc2"),
    "phimoe": Family(routed=True, window_in_mask=True),
    "starcoder2": Family("c_fc_c_proj"),
}  # fmt: skip

_OTHER_MODEL = "use a model that has attention over all earlier tokens in every layer"
_STATE = f"its layers keep a state beside keys and values, which sessions here do not hold; {_OTHER_MODEL}"
_INDEXER = f"a second network chooses which keys its attention reads; {_OTHER_MODEL}"
_ALIBI = (
    "its attention adds a bias by distance and takes no other attention function; use a model with rotary positions"
)
_OWN = "its attention is its own and takes no other attention function; use a model of a family that is served"
_PICTURES = "it reads pictures or sound as well; save its text part (model.language_model) as a checkpoint of its own"

# why a model type is refused, where more can be said than that it is not known
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear",
         "lara_mini", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid",
         "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
         "zaya"), _STATE),
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text"),
        _INDEXER),
    **dict.fromkeys(("bloom", "falcon", "mpt"), _ALIBI),
    **dict.fromkeys(("gpt_neo", "gpt_neox_japanese", "xglm"), _OWN),
    **dict.fromkeys(
        ("gemma3", "gemma3n", "gemma4", "llama4", "mistral3", "mllama", "phi4_multimodal", "qwen2_vl", "qwen2_5_vl",
         "qwen3_vl", "qwen3_5", "qwen3_5_moe", "fuyu", "git", "got_ocr2"), _PICTURES),
    "diffllama": f"its attention runs twice in a layer; {_OTHER_MODEL}",
    "doge": f"its attention hides keys by what they hold; {_OTHER_MODEL}",
    "dory": f"its layers look at positions of a whole call; {_OTHER_MODEL}",
    "gemma3n_text": "its layers share keys and values and carry several streams; use gemma3",
    "hrm_text": f"its layers run several times for a token; {_OTHER_MODEL}",
    "longcat_flash": "its layers hold two attentions each; use a model of a family that is served",
}  # fmt: skip


def family_of(model_type: str) -> Family:
    """What is known of an architecture.

    Raises:
        ModelError: an architecture that is not served; says why, and what would help.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise ModelError(f"model type {model_type!r} is not served: {REFUSED[model_type]} (docs/models.md)")
    raise ModelError(
        f"model type {model_type!r} is not served: nothing is known of its layers; these are: "
        f"{', '.join(sorted(FAMILIES))} (docs/models.md says how one is added)"
    )
