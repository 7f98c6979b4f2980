"""Attention without masks: for training, and chunk by chunk for reading long documents on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def local_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
    """Causal attention to the last ``window`` positions; all are [B, H, T, D]."""
    length = query.shape[2]
    keys = [F.pad(key, (0, 0, back, 0))[:, :, :length] for back in range(window)]
    values = [F.pad(value, (0, 0, back, 0))[:, :, :length] for back in range(window)]
    scores = torch.stack([(query * shifted).sum(-1) for shifted in keys], -1) * scaling
    position = torch.arange(length).unsqueeze(-1)
    shares = scores.masked_fill(position < torch.arange(window), float("-inf")).softmax(-1)
    mixed = shares[..., :1] * values[0]
    for back in range(1, window):
        mixed = mixed + shares[..., back : back + 1] * values[back]
    return mixed


def chunk_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last T of N positions to all N; query [B, H, T, D], key and value [B, H, N, D].

    The past and the chunk itself are attended to apart and merged by their log-sum-exp, so that no [T, N] mask is
    needed.
    """
    length = query.shape[2]
    past = key.shape[2] - length
    own, own_total = _flash(query, key[:, :, past:], value[:, :, past:], 0.0, True, scale=scaling)
    if past == 0:
        return own
    earlier, earlier_total = _flash(query, key[:, :, :past], value[:, :, :past], 0.0, False, scale=scaling)
    share = torch.sigmoid(own_total - earlier_total).unsqueeze(-1)
    return torch.lerp(earlier, own, share)


class MasklessAttention:
    """An attention function for ``transformers`` that needs no masks; ``sharpness`` scales the full layers' logits."""

    name = "maskless"

    def __init__(self) -> None:
        self.sharpness = 1.0
        AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attention output [B, T, H, D] of whole sequences [B, H, T, D]; no weights."""
        if sliding_window is not None:
            mixed = local_attention(query, key, value, scaling, sliding_window)
        else:
            sharp = scaling * self.sharpness
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=sharp)
        return mixed.transpose(1, 2).contiguous(), None
