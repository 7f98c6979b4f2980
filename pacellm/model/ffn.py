"""The down-projection of an FFN that reads and writes banks.

Its input is the inner activation x, whatever the FFN in front of it looks like, and its output is the y that banks
hold, so one wrapper serves every family. It calls the original projection, so quantised or sharded ones keep working;
without a step, or for a request whose banks are off, it is the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pacellm.config import PRESETS, Preset
from pacellm.memory import decode_cpu, decode_device, segment
from pacellm.memory.decode_cpu import DecodedToken
from pacellm.memory.decode_device import best_feed
from pacellm.memory.similarity import Total
from pacellm.memory.tokens import DecodedTokens
from pacellm.model.context import Banks, Chunk, DecodeRows, Observed, StepContext, current_step
from pacellm.model.side_stream import on_side_stream
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
        return self.remember(step, inner.flatten(0, -2), plain.flatten(0, -2)).view(plain.shape)

    def remember(self, step: StepContext, inner: Tensor, plain: Tensor) -> Tensor:
        """FFN outputs [T, H] with memory, of a step's inner activations [T, F] and plain outputs [T, H]."""
        if step.decode is not None and step.arenas:
            return self._remember_step(step, step.decode, inner, plain)
        if not any(chunk.banks for chunk in step.chunks):
            return plain
        output = plain.clone() if step.acting else plain  # what is only observed is never written to
        for chunk in step.chunks:
            if chunk.banks is not None:
                self._remember_prompt(step, chunk, chunk.banks, inner, plain, output)
        step.failing = None
        if step.decoding:
            remember = self._remember_tokens if inner.device.type == "cpu" else self._remember_rows
            remember(step, inner, plain, output)
        return output

    def _remember_prompt(
        self, step: StepContext, chunk: Chunk, owned: Banks, inner: Tensor, plain: Tensor, output: Tensor
    ) -> None:
        """Read, and where the request may write, stage and write, piece by piece in order."""
        if not chunk.prompt_pieces:
            return
        step.failing = chunk
        config, bias = step.pa.of(owned.preset), self.bias
        state, staged = owned.banks[self.layer], owned.stages[self.layer]
        for piece in chunk.prompt_pieces:
            rows = slice(piece.start, piece.stop)
            x, y = inner[rows], _without(bias, plain[rows])
            result = segment.read(state, x, y, config, self._total(step))
            if config.acts:
                output[rows] = _with(bias, result.output)
            if owned.writes:
                segment.stage(staged, result, x, config)
            else:
                segment.count(staged, result)
            if piece.ends and owned.writes:
                segment.write(state, staged, config)
            elif piece.ends:
                segment.settle(state, staged)

    def _remember_tokens(self, step: StepContext, inner: Tensor, plain: Tensor, output: Tensor) -> None:
        """Decoded tokens on a CPU, each preset's in turn; those that are only observed at the end of the step."""
        chunks = [chunk for chunk, _ in step.decoding]
        first = chunks[0].stop - chunks[0].num_decoded
        y = _without(self.bias, plain[first : chunks[-1].stop])
        if step.observes and self.bias is None:
            y = y.clone()  # a model may change in place what it is given before the step ends
        seen = Observed(self.layer, inner, y, first, self._total(step))
        if step.observes:
            step.observed.append(seen)
        for preset in step.acting:
            for tokens in _tokens(step, preset, [seen]):
                found = torch.stack(decode_cpu.feed(tokens, step.pa.of(preset), seen.total))
                output[[token.row for token in tokens]] = _with(self.bias, found)

    def _remember_rows(self, step: StepContext, inner: Tensor, plain: Tensor, output: Tensor) -> None:
        """Decoded tokens on a device: rows of the arena by index, which are uploaded once a step."""
        turns = step.scratch.get("decoded rows")
        if turns is None:
            turns = step.scratch["decoded rows"] = _uploaded(step, inner.device)
        for rows, tokens, acts in turns:  # type: ignore[attr-defined]
            found = self._feed_rows(step, tokens, inner[rows], plain[rows])
            if acts:
                output.index_copy_(0, rows, torch.where(tokens.acts[:, None], found, plain[rows]))

    def _remember_step(self, step: StepContext, decode: DecodeRows, inner: Tensor, plain: Tensor) -> Tensor:
        """A step of one token for each sequence: rows of the arena by index, nothing waits for the device."""
        if not decode.acts:
            with on_side_stream(step, inner, plain):
                self._feed_rows(step, decode.tokens, inner, plain)
            return plain
        found = self._feed_rows(step, decode.tokens, inner, plain)
        return torch.where(decode.tokens.acts[:, None], found, plain)

    def _feed_rows(self, step: StepContext, tokens: DecodedTokens, inner: Tensor, plain: Tensor) -> Tensor:
        """[B, H] outputs of one token for each row of the arena that ``tokens`` names."""
        device, total = inner.device, self._total(step)
        feed = best_feed(device) if total is None else partial(decode_device.feed, total=total)
        sets = None if step.sets is None else step.sets.layers[self.layer]
        arena, y = step.arenas[self.layer], _without(self.bias, plain)
        return _with(self.bias, feed(arena, _whole_sets(step, tokens), inner, y, step.pa, sets))

    def _total(self, step: StepContext) -> Total | None:
        return step.total if self.is_split else None


def _without(bias: Tensor | None, output: Tensor) -> Tensor:
    return output if bias is None else output - bias


def _with(bias: Tensor | None, output: Tensor) -> Tensor:
    return output if bias is None else output + bias


def observe(step: StepContext) -> None:
    """Feed the banks of decoded tokens that are only observed, of all layers at once: a layer's few operations find
    nothing in the caches, all layers' are found there but once."""
    for total in dict.fromkeys(seen.total for seen in step.observed):
        layers = [seen for seen in step.observed if seen.total == total]
        for tokens in _tokens(step, "observe", layers):
            decode_cpu.feed(tokens, step.pa.of("observe"), total)
    step.observed.clear()


Turn = list[tuple[int, Chunk, Banks]]


def _turns(decoding: list[tuple[Chunk, Banks]]) -> Iterator[Turn]:
    """The first decoded token of every sequence by its row, then the second, and so on; a step has more than one of a
    sequence only where a log is replayed."""
    turn, left = 0, decoding
    while left:
        yield [(chunk.stop - chunk.num_decoded + turn, chunk, banks) for chunk, banks in left]
        turn += 1
        left = [(chunk, banks) for chunk, banks in left if chunk.num_decoded > turn]


def _tokens(step: StepContext, preset: Preset, layers: list[Observed]) -> Iterator[list[DecodedToken]]:
    """A preset's decoded tokens in these layers, turn by turn."""
    for turn in _turns([(chunk, banks) for chunk, banks in step.decoding if banks.preset == preset]):
        yield [
            DecodedToken(
                owned.banks[layer], owned.writes, inner, row, y[row - first], chunk.mask(layer, inner.shape[1])
            )
            for layer, inner, y, first, _ in layers
            for row, chunk, owned in turn
        ]


def _uploaded(step: StepContext, device: torch.device) -> list[tuple[Tensor, DecodedTokens, bool]]:
    """For each turn rows of the step, whose banks they meet, and whether any of these act."""
    has_sets = any(chunk.set_row is not None for chunk, _ in step.decoding)
    everything = 0 if step.sets is None else step.sets.everything
    return [_upload(turn, device, has_sets, everything) for turn in _turns(step.decoding)]


def _upload(turn: Turn, device: torch.device, has_sets: bool, everything: int) -> tuple[Tensor, DecodedTokens, bool]:
    numbers = [
        (
            row,
            banks.row,
            banks.writes,
            PRESETS.index(banks.preset),
            everything if chunk.set_row is None else chunk.set_row,
        )
        for row, chunk, banks in turn
    ]
    rows, owned, writes, presets, sets = to_device(torch.tensor(numbers, dtype=torch.int64).T.contiguous(), device)
    live = torch.ones_like(owned, dtype=torch.bool)
    tokens = DecodedTokens(owned, live, writes.bool(), presets, sets if has_sets else None)
    return rows, tokens, any(banks.acts for _, _, banks in turn)


def _whole_sets(step: StepContext, tokens: DecodedTokens) -> DecodedTokens:
    """Where no token has a set but in other steps some may, sets of everything: a kernel with and one without sets may
    sum in another order."""
    if not step.deterministic or step.sets is None or tokens.sets is not None:
        return tokens
    return tokens._replace(sets=torch.full_like(tokens.rows, step.sets.everything))
