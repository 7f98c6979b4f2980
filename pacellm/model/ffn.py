"""The FFN that reads and writes banks.

It calls the original projections, so quantised or sharded linears keep working, and without a step, or for a
request whose banks are off, it is the original FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pacellm.memory import bank, decoded
from pacellm.model.context import Banks, Piece, StepContext, current_step
from pacellm.model.families import Layout, activation_of


class PersistentFFN(nn.Module):
    """A gated FFN with working memory.

    Args:
        original: the model's own FFN, kept as a submodule.
        layer: the decoder layer's number, counted from 0.
        layout: how the FFN's projections are laid out.
    """

    def __init__(self, original: nn.Module, layer: int, layout: Layout) -> None:
        super().__init__()
        self.original: Any = original
        self.layer = layer
        self.layout = layout
        self.activation: Any = activation_of(original)

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, T, H] -> [1, T, H]."""
        step = current_step()
        if step is None or not any(chunk.banks for chunk in step.chunks):
            return self.original(hidden)
        inner = self.inner(hidden)
        plain = self.original.down_proj(inner)
        output = plain[0].clone()
        alone = hidden.device.type == "cpu"
        for chunk in step.chunks:
            if chunk.banks is not None:
                step.failing = chunk
                pieces = chunk.pieces[: len(chunk.pieces) - chunk.num_decoded] if alone else chunk.pieces
                self._remember(pieces, chunk.banks, step, inner[0], plain[0], output)
        step.failing = None
        if alone:
            self._remember_decoded(step, inner[0], plain[0], output)
        return output[None]

    def inner(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., F], ``act(gate) * up``."""
        if self.layout == "fused_gate_up":
            gate, up = self.original.gate_up_proj(hidden).chunk(2, dim=-1)
            return up * self.activation(gate)
        return self.activation(self.original.gate_proj(hidden)) * self.original.up_proj(hidden)

    def _remember(
        self,
        pieces: Sequence[Piece],
        owned: Banks,
        step: StepContext,
        inner: Tensor,
        plain: Tensor,
        output: Tensor,
    ) -> None:
        """Read, and where the request may write, stage and write, piece by piece in order."""
        state, bias = owned.banks[self.layer], self.original.down_proj.bias
        for piece in pieces:
            rows = slice(piece.start, piece.stop)
            x, y = inner[rows], plain[rows]
            result = bank.read(state, x, y if bias is None else y - bias, step.pa)
            output[rows] = result.output if bias is None else result.output + bias
            if owned.mode == "on":
                staged = owned.stages[self.layer]
                bank.stage(staged, result, x, step.pa)
                if piece.ends:
                    bank.write(state, staged, step.pa)

    def _remember_decoded(self, step: StepContext, inner: Tensor, plain: Tensor, output: Tensor) -> None:
        """The same for decoded tokens: the first of every sequence at once, then the second, and so on; a step has more
        than one of a sequence only where a log is replayed."""
        bias = self.original.down_proj.bias
        turn, left = 0, [chunk for chunk in step.chunks if chunk.banks is not None and chunk.num_decoded]
        while left:
            rows = torch.tensor([chunk.stop - chunk.num_decoded + turn for chunk in left])
            owned = [chunk.banks for chunk in left if chunk.banks is not None]
            y = plain[rows] if bias is None else plain[rows] - bias
            banks = [one.banks[self.layer] for one in owned]
            found = decoded.feed(banks, [one.mode == "on" for one in owned], inner[rows], y, step.pa)
            output[rows] = found if bias is None else found + bias
            turn += 1
            left = [chunk for chunk in left if chunk.num_decoded > turn]
