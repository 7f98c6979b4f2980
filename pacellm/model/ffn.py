"""The FFN that reads and writes banks.

It calls the original projections, so quantised or sharded linears keep working, and without a step, or for a
request whose banks are off, it is the original FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pacellm.memory import bank, decoded
from pacellm.memory.bank import Total
from pacellm.memory.feed import Feed, Tokens, best_feed, feed
from pacellm.model.context import Banks, Chunk, Piece, StepContext, current_step
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
        self.is_split = False  # over the ranks of a tensor-parallel model, along the inner activations

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, T, H] -> [1, T, H]."""
        step = current_step()
        if step is not None and step.decode is not None and step.arenas:
            return self._forward_decoded(step, hidden)
        if step is None or not any(chunk.banks for chunk in step.chunks):
            return self.original(hidden)
        inner = self.inner(hidden)
        plain = self.original.down_proj(inner)
        output = plain[0].clone()
        for chunk in step.chunks:
            if chunk.banks is not None:
                step.failing = chunk
                pieces = chunk.pieces[: len(chunk.pieces) - chunk.num_decoded]
                self._remember(pieces, chunk.banks, step, inner[0], plain[0], output)
        step.failing = None
        if hidden.device.type == "cpu":
            self._remember_decoded(step, inner[0], plain[0], output)
        else:
            self._remember_rows(step, inner[0], plain[0], output)
        return output[None]

    def _forward_decoded(self, step: StepContext, hidden: Tensor) -> Tensor:
        """A step of one token for each sequence: rows of banks by index, nothing that waits for the device."""
        assert step.decode is not None
        inner = self.inner(hidden)
        plain = self.original.down_proj(inner)[0]
        bias, tokens = self.original.down_proj.bias, step.decode.tokens
        found = self._feed(hidden.device, self._total(step))(
            step.arenas[self.layer], tokens, inner[0], plain if bias is None else plain - bias, step.pa
        )
        output = found if bias is None else found + bias
        return torch.where(tokens.live[:, None], output, plain)[None]

    def _feed(self, device: torch.device, total: Total | None) -> Feed:
        return best_feed(device) if total is None else partial(feed, total=total)

    def _total(self, step: StepContext) -> Total | None:
        return step.total if self.is_split else None

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
            result = bank.read(state, x, y if bias is None else y - bias, step.pa, self._total(step))
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
            found = decoded.feed(banks, [one.mode == "on" for one in owned], inner[rows], y, step.pa, self._total(step))
            output[rows] = found if bias is None else found + bias
            turn += 1
            left = [chunk for chunk in left if chunk.num_decoded > turn]

    def _remember_rows(self, step: StepContext, inner: Tensor, plain: Tensor, output: Tensor) -> None:
        """The same on a device: rows of the arena by index, which are uploaded once a step."""
        turns = step.scratch.get("decoded rows")
        if turns is None:
            turns = step.scratch["decoded rows"] = _decoded_rows(step.chunks, inner.device)
        bias = self.original.down_proj.bias
        for rows, tokens in turns:  # type: ignore[attr-defined]
            y = plain[rows] if bias is None else plain[rows] - bias
            found = self._feed(inner.device, self._total(step))(
                step.arenas[self.layer], tokens, inner[rows], y, step.pa
            )
            output.index_copy_(0, rows, found if bias is None else found + bias)


def _decoded_rows(chunks: Sequence[Chunk], device: torch.device) -> list[tuple[Tensor, Tokens]]:
    """Rows of the step and whose banks they meet: the first decoded token of every sequence, then the second, …"""
    turns, turn = [], 0
    left = [(chunk, chunk.banks) for chunk in chunks if chunk.banks is not None and chunk.num_decoded]
    while left:
        numbers = [
            [chunk.stop - chunk.num_decoded + turn for chunk, _ in left],
            [banks.row for _, banks in left],
            [banks.mode == "on" for _, banks in left],
        ]
        host = torch.tensor(numbers, dtype=torch.int64)
        rows, owned, writes = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        turns.append((rows, Tokens(owned, torch.ones_like(owned, dtype=torch.bool), writes.bool())))
        turn += 1
        left = [(chunk, banks) for chunk, banks in left if chunk.num_decoded > turn]
    return turns
