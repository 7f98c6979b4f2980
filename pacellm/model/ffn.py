"""The down-projection of an FFN that reads and writes banks.

Its input is the inner activation x, whatever the FFN in front of it looks like, and its output is the y that banks
hold, so one wrapper serves every family. It calls the original projection, so quantised or sharded ones keep working;
without a step, or for a request whose banks are off, it is the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pacellm.config import PRESETS, Preset
from pacellm.memory import bank
from pacellm.memory import decode as decoded
from pacellm.memory.bank import Total
from pacellm.memory.decode import Token
from pacellm.memory.feed import Feed, best_feed, feed
from pacellm.memory.tokens import Tokens
from pacellm.model.context import Banks, Chunk, Observed, Piece, StepContext, current_step
from pacellm.model.side_stream import beside
from pacellm.transfer import to_device


class PersistentDown(nn.Module):
    """A down-projection with working memory.

    Args:
        original: the model's own projection, kept as a submodule.
        layer: the decoder layer's number, counted from 0.
    """

    def __init__(self, original: nn.Module, layer: int) -> None:
        super().__init__()
        self.original: Any = original
        self.layer = layer
        self.is_split = False  # over the ranks of a tensor-parallel model, along the inner activations

    @property
    def weight(self) -> Tensor:
        """The original's."""
        return self.original.weight

    @property
    def bias(self) -> Tensor | None:
        """The original's."""
        return self.original.bias

    def forward(self, inner: Tensor) -> Tensor:
        """Inner activations [1, T, F] or [T, F] -> FFN outputs [1, T, H] or [T, H]."""
        step = current_step()
        plain = self.original(inner)
        if step is None:
            return plain
        if step.decode is not None and step.arenas:
            return self.remember_static(step, inner.flatten(0, -2), plain.flatten(0, -2)).view(plain.shape)
        if not any(chunk.banks for chunk in step.chunks):
            return plain
        return self.remember(step, inner.flatten(0, -2), plain.flatten(0, -2)).view(plain.shape)

    def remember(self, step: StepContext, inner: Tensor, plain: Tensor) -> Tensor:
        """FFN outputs [T, H] with memory, of a step's inner activations [T, F] and plain outputs [T, H]."""
        output = plain.clone() if step.acting else plain  # what is only observed is never written to
        for chunk in step.chunks:
            if chunk.banks is not None:
                pieces = chunk.pieces[: len(chunk.pieces) - chunk.num_decoded]
                if pieces:
                    step.failing = chunk
                    self._remember(pieces, chunk, step, inner, plain, output)
        step.failing = None
        if inner.device.type == "cpu":
            self._remember_decoded(step, inner, plain, output)
        else:
            self._remember_rows(step, inner, plain, output)
        return output

    def remember_static(self, step: StepContext, inner: Tensor, plain: Tensor) -> Tensor:
        """The same for a step of one token for each sequence: rows of banks by index, nothing waits for the device."""
        assert step.decode is not None
        bias, tokens = self.bias, _whole_sets(step, step.decode.tokens)

        def fed() -> Tensor:
            y = plain if bias is None else plain - bias
            feed_rows = self._feed(inner.device, self._total(step))
            return feed_rows(step.arenas[self.layer], tokens, inner, y, step.pa, self._sets(step))

        if not step.decode.acts:
            with beside(step, inner, plain):
                fed()
            return plain
        found = fed()
        return torch.where(tokens.acts[:, None], found if bias is None else found + bias, plain)

    def _feed(self, device: torch.device, total: Total | None) -> Feed:
        return best_feed(device) if total is None else partial(feed, total=total)

    def _sets(self, step: StepContext) -> Tensor | None:
        return None if step.sets is None else step.sets.layers[self.layer]

    def _total(self, step: StepContext) -> Total | None:
        return step.total if self.is_split else None

    def _remember(
        self,
        pieces: Sequence[Piece],
        chunk: Chunk,
        step: StepContext,
        inner: Tensor,
        plain: Tensor,
        output: Tensor,
    ) -> None:
        """Read, and where the request may write, stage and write, piece by piece in order."""
        owned, bias = chunk.banks, self.bias
        assert owned is not None
        config = step.pa.of(owned.preset)
        state, mask = owned.banks[self.layer], chunk.mask(self.layer, inner.shape[1])
        for number, piece in enumerate(pieces):
            restricts = mask if number >= len(chunk.pieces) - chunk.num_decoded else None
            rows = slice(piece.start, piece.stop)
            x, y = inner[rows], plain[rows]
            y = y.clone() if bias is None else y - bias
            result = bank.read(state, x, y, config, self._total(step), restricts)
            if config.acts:
                output[rows] = result.output if bias is None else result.output + bias
            staged = owned.stages[self.layer]
            if owned.writes:
                bank.stage(staged, result, x, config)
                if piece.ends:
                    bank.write(state, staged, config)
                continue
            bank.count(staged, result)
            if piece.ends:
                bank.settle(state, staged)

    def _remember_decoded(self, step: StepContext, inner: Tensor, plain: Tensor, output: Tensor) -> None:
        """The same for decoded tokens, each preset's in turn; those that are only observed at the end of the step."""
        decoding, bias = step.decoding, self.bias
        if not decoding:
            return
        first = decoding[0][0].stop - decoding[0][0].num_decoded
        y = plain[first : decoding[-1][0].stop]
        y = y.clone() if bias is None else y - bias  # a model may change in place what it is given
        seen = Observed(self.layer, inner, y, first, self._total(step))
        if step.observes:
            step.observed.append(seen)
        for preset in step.acting:
            for tokens in _turns(decoding, preset, [seen]):
                found = torch.stack(decoded.feed(tokens, step.pa.of(preset), seen.total))
                output[[token.row for token in tokens]] = found if bias is None else found + bias

    def _remember_rows(self, step: StepContext, inner: Tensor, plain: Tensor, output: Tensor) -> None:
        """The same on a device: rows of the arena by index, which are uploaded once a step."""
        turns = step.scratch.get("decoded rows")
        if turns is None:
            turns = step.scratch["decoded rows"] = _decoded_rows(step, inner.device)
        bias = self.bias
        for rows, tokens, acts in turns:  # type: ignore[attr-defined]
            y = plain[rows] if bias is None else plain[rows] - bias
            found = self._feed(inner.device, self._total(step))(
                step.arenas[self.layer], _whole_sets(step, tokens), inner[rows], y, step.pa, self._sets(step)
            )
            if acts:
                mixed = torch.where(tokens.acts[:, None], found if bias is None else found + bias, plain[rows])
                output.index_copy_(0, rows, mixed)


def observe(step: StepContext) -> None:
    """Feed the banks of decoded tokens that are only observed, of all layers at once: a layer's few operations find
    nothing in the caches, all layers' are found there but once."""
    for total in dict.fromkeys(seen.total for seen in step.observed):
        layers = [seen for seen in step.observed if seen.total == total]
        for tokens in _turns(step.decoding, "observe", layers):
            decoded.feed(tokens, step.pa.of("observe"), total)
    step.observed.clear()


def _turns(decoding: list[tuple[Chunk, Banks]], preset: Preset, layers: list[Observed]) -> Iterator[list[Token]]:
    """A preset's decoded tokens: the first of every sequence in every layer, then the second, and so on; a step has
    more than one of a sequence only where a log is replayed."""
    turn, left = 0, [(chunk, banks) for chunk, banks in decoding if banks.preset == preset]
    while left:
        tokens = []
        for layer, inner, y, first, _ in layers:
            for chunk, owned in left:
                row = chunk.stop - chunk.num_decoded + turn
                mask = chunk.mask(layer, inner.shape[1])
                tokens.append(Token(owned.banks[layer], owned.writes, inner, row, y[row - first], mask))
        yield tokens
        turn += 1
        left = [(chunk, banks) for chunk, banks in left if chunk.num_decoded > turn]


def _whole_sets(step: StepContext, tokens: Tokens) -> Tokens:
    """Where no token has a set but in other steps some may, sets of everything: a kernel with and one without sets may
    sum in another order."""
    if not step.deterministic or step.sets is None or tokens.sets is not None:
        return tokens
    return tokens._replace(sets=torch.full_like(tokens.rows, step.sets.everything))


def _decoded_rows(step: StepContext, device: torch.device) -> list[tuple[Tensor, Tokens, bool]]:
    """Rows of the step, whose banks they meet, and whether any of these act: the first decoded token of every sequence,
    then the second, …"""
    turns, turn, left = [], 0, step.decoding
    has_sets = any(chunk.set_row is not None for chunk, _ in left)
    everything = 0 if step.sets is None else step.sets.everything
    while left:
        numbers = [
            [chunk.stop - chunk.num_decoded + turn for chunk, _ in left],
            [banks.row for _, banks in left],
            [banks.writes for _, banks in left],
            [PRESETS.index(banks.preset) for _, banks in left],
            [everything if chunk.set_row is None else chunk.set_row for chunk, _ in left],
        ]
        rows, owned, writes, presets, sets = to_device(torch.tensor(numbers, dtype=torch.int64), device)
        live = torch.ones_like(owned, dtype=torch.bool)
        tokens = Tokens(owned, live, writes.bool(), presets, sets if has_sets else None)
        turns.append((rows, tokens, any(banks.acts for _, banks in left)))
        turn += 1
        left = [(chunk, banks) for chunk, banks in left if chunk.num_decoded > turn]
    return turns
