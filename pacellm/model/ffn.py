"""The FFN that reads and writes banks.

It calls the original projections, so quantised or sharded linears keep working, and without a step, or for a
request whose banks are off, it is the original FFN.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pacellm.memory import bank
from pacellm.model.context import Banks, Chunk, StepContext, current_step
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
        for chunk in step.chunks:
            if chunk.banks is not None:
                step.failing = chunk
                self._remember(chunk, chunk.banks, step, inner[0], plain[0], output)
        step.failing = None
        return output[None]

    def inner(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., F], ``act(gate) * up``."""
        if self.layout == "fused_gate_up":
            gate, up = self.original.gate_up_proj(hidden).chunk(2, dim=-1)
            return up * self.activation(gate)
        return self.activation(self.original.gate_proj(hidden)) * self.original.up_proj(hidden)

    def _remember(
        self, chunk: Chunk, owned: Banks, step: StepContext, inner: Tensor, plain: Tensor, output: Tensor
    ) -> None:
        """Read, and where the request may write, stage and write, piece by piece in order."""
        state, bias = owned.banks[self.layer], self.original.down_proj.bias
        for piece in chunk.pieces:
            rows = slice(piece.start, piece.stop)
            x, y = inner[rows], plain[rows]
            result = bank.read(state, x, y if bias is None else y - bias, step.pa)
            output[rows] = result.output if bias is None else result.output + bias
            if owned.mode == "on":
                staged = owned.stages[self.layer]
                bank.stage(staged, result, x, step.pa)
                if piece.ends:
                    bank.write(state, staged, step.pa)
