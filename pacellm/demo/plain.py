"""A small plain forward for long documents on a CPU: the ``transformers`` modules, layer by layer, chunk by chunk.

A document is read once; every question then continues from a truncated cache. In the last layer only the keys and
values of the document are computed, as nothing else of it is ever used, which halves the cost of reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, apply_rotary_pos_emb

from pacellm.demo.attention import chunk_attention, local_attention


@dataclass
class LayerCache:
    """Keys and values [1, H, N, D] of one layer; a sliding layer keeps its last ``window`` - 1 positions only."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind the first ``length`` positions (full layers); all positions come back."""
        stop = self.length + keys.shape[2]
        if stop > self.keys.shape[2]:
            room = max(stop, 2 * self.keys.shape[2]) - self.keys.shape[2]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, room))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, room))
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def slide(self, keys: Tensor, values: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Put the kept positions before the new ones (sliding layers); keep the last ``kept``."""
        keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys[:, :, -kept:], values[:, :, -kept:]
        return keys, values


@dataclass(frozen=True)
class Mark:
    """A place in a cache to go back to: positions read, and each layer's keys, values and length there."""

    position: int
    layers: list[tuple[Tensor, Tensor, int]]


class PlainAnswerer:
    """Greedy answers about one conversation prefix that is read once.

    Args:
        model: a float32 model with SmolLM3's modules.
        tokenizer: the tokenizer of its directory.
        chunk: tokens read at a time.
    """

    def __init__(self, model: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerBase, chunk: int = 512) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config
        self.chunk = chunk
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read."""
        size = self.config.hidden_size // self.config.num_attention_heads
        empty = torch.zeros(1, self.config.num_key_value_heads or self.config.num_attention_heads, 0, size)
        self.layers = [LayerCache(empty, empty) for _ in range(self.config.num_hidden_layers)]
        self.position = 0

    def mark(self) -> Mark:
        """Remember this place; appended keys and values behind it are overwritten later, not copied."""
        return Mark(self.position, [(layer.keys, layer.values, layer.length) for layer in self.layers])

    def restore(self, mark: Mark) -> None:
        """Go back to ``mark``."""
        self.position = mark.position
        self.layers = [LayerCache(*state) for state in mark.layers]

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Read tokens after those read before; logits [V] after the last one."""
        logits = torch.empty(0)
        for start in range(0, len(ids), self.chunk):
            logits = self._forward(torch.tensor([ids[start : start + self.chunk]]))
        return logits

    def answer(self, ids: Sequence[int], max_tokens: int = 24) -> str:
        """Read ``ids`` (a question up to the assistant's token), answer greedily, go back to the place before."""
        mark = self.mark()
        answered: list[int] = []
        token = int(self.read(ids).argmax())
        while token != self.config.eos_token_id and len(answered) < max_tokens:
            answered.append(token)
            token = int(self.read([token]).argmax())
        self.restore(mark)
        return str(self.tokenizer.decode(answered))

    def _forward(self, ids: Tensor) -> Tensor:
        """One chunk [1, T] through all layers; logits [V] of its last token."""
        backbone = self.model.model
        hidden = backbone.embed_tokens(ids)
        positions = torch.arange(self.position, self.position + ids.shape[1]).unsqueeze(0)
        rotary = backbone.rotary_emb(hidden, positions)
        for index, layer in enumerate(backbone.layers):
            hidden = self._layer(layer, index, hidden, rotary)
        self.position += ids.shape[1]
        return self.model.lm_head(backbone.norm(hidden[:, -1]))[0]

    def _layer(self, layer: SmolLM3DecoderLayer, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """One layer [1, T, C]; the last layer gives the last position [1, 1, C] only."""
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.use_rope:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        if attention.sliding_window:
            window = attention.sliding_window
            key, value = self.layers[index].slide(key, value, window - 1)
            padded = torch.nn.functional.pad(query, (0, 0, key.shape[2] - query.shape[2], 0))
            mixed = local_attention(padded, key, value, attention.scaling, window)[:, :, -query.shape[2] :]
        else:
            key, value = self.layers[index].append(key, value)
            if index == len(self.layers) - 1:
                query, hidden = query[:, :, -1:], hidden[:, -1:]
            mixed = chunk_attention(query, key, value, attention.scaling)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
