"""What models ask of attention beyond a softmax over all earlier tokens: windows, chunks, soft caps, sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.rows import pad_rows

_SPLIT = 512  # keys taken at once by the capped kernel, as the system's kernel does
_plain = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Form:
    """How one layer attends.

    Attributes:
        scale: of the scores.
        window: a query sees itself and ``window - 1`` tokens before it; None sees all.
        chunk: a query sees only positions of its own block of this many, counted from 0; None sees all.
        softcap: scores s become ``softcap * tanh(s / softcap)``; None leaves them.
        sinks: [H] logits that take part in the softmax and carry no value; None has none.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def special(self) -> list[str]:
        """Names of what is asked beyond a window."""
        names = (("chunked attention", self.chunk), ("soft-capping", self.softcap), ("sinks", self.sinks))
        return [name for name, value in names if value is not None]

    def kernel(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """([B, H, n, D], log-sum-exp [B, H, n]) on a CPU; rows keep their bits whatever rows stand beside them."""
        if self.softcap is None:
            return _plain(query, key, value, attn_mask=mask, is_causal=is_causal, scale=self.scale)
        if is_causal:
            hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
            mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
        return _capped(query, key, value, mask, self.scale, self.softcap)

    def with_sinks(self, output: Tensor, lse: Tensor | None, group: int) -> Tensor:
        """[B, Hkv, n, D] with the sinks' share taken off; row r belongs to head ``r % group`` of its KV group."""
        if self.sinks is None or lse is None:
            return output
        rows = torch.arange(output.shape[2]) % group
        sinks = self.sinks.view(-1, group)[:, rows]
        share = 1.0 / (1.0 + (sinks - lse).exp())  # a sigmoid has other bits behind the last whole vector
        return (output * share[..., None]).to(output.dtype)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Attention with capped scores, ``_SPLIT`` keys at a time: keys that are hidden change no bit of a row."""
    num_rows = query.shape[2]
    query = pad_rows(query)
    highest = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    total = torch.zeros_like(highest)
    output = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=torch.float32)
    for start in range(0, key.shape[2], _SPLIT):
        part = slice(start, min(start + _SPLIT, key.shape[2]))
        scores = cap * torch.tanh((query @ key[:, :, part].transpose(-1, -2)).float() * (scale / cap))
        if mask is not None:
            scores[:, :, :num_rows] += mask[..., part]
        peak = torch.maximum(highest, scores.amax(-1))
        base = peak.masked_fill(peak == -torch.inf, 0.0)
        old, weights = (highest - base).exp(), (scores - base[..., None]).exp()
        total = total * old + weights.sum(-1)
        output = output * old[..., None] + (weights.to(value.dtype) @ value[:, :, part]).float()
        highest = peak
    lse = highest + total.log()
    return (output / total[..., None])[:, :, :num_rows].to(query.dtype), lse[:, :, :num_rows]
