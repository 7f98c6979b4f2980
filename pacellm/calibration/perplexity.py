"""How much worse a model predicts a text where banks act, or where decoded tokens use a part of their experts.

The text is read as a session would be: two prompts, cut into segments as the engine cuts them, then an answer whose
tokens are segments of their own. What is scored begins behind the first segment, which meets empty banks and so is the
plain model's, to the bit. Nothing before a patched layer changes either. Both are taken from the plain reading; only
what lies behind them is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from pacellm.calibration.layer_outputs import LayerOutputs
from pacellm.config import PAConfig
from pacellm.errors import ConfigError
from pacellm.experts.forward import attach, detach
from pacellm.memory.expert_counts import EXPERTS
from pacellm.memory.pool import BankPool
from pacellm.model.attention.dispatch import slab
from pacellm.model.context import Banks, Chunk, Experts, Piece, Run, StepContext, step_context
from pacellm.model.load import LoadedModel
from pacellm.model.neurons import decoder_layers
from pacellm.model.patch import patch, unpatch
from pacellm.rows import missing_rows
from pacellm.run.batch import padded
from pacellm.view import BLOCK

LEAST = 96
"""Tokens without which nothing is measured."""
_CHUNK = 512
_LOGITS = 2**26  # numbers, of one forward pass
OnWork = Callable[[float], None]


@dataclass(frozen=True)
class ReadingPlan:
    """How a text of ``length`` tokens is read.

    Attributes:
        length: tokens.
        first: where the first segment ends.
        answer: where decoded tokens begin.
        cuts: where segments of the prompts end, ``first`` and ``answer`` among them.
    """

    length: int
    first: int
    answer: int
    cuts: tuple[int, ...]

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of forward passes of up to ``size`` tokens; none goes over ``first`` or ``answer``."""
        for start, stop in ((0, self.first), (self.first, self.answer), (self.answer, self.length)):
            for position in range(start, stop, size):
                yield position, min(position + size, stop)

    def pieces(self, start: int, stop: int) -> tuple[Piece, ...]:
        """Rows of a pass cut at segment ends."""
        if start >= self.answer:
            return tuple(Piece(row, row + 1, True) for row in range(stop - start))
        bounds = [start, *(cut for cut in self.cuts if start < cut < stop), stop]
        return tuple(Piece(a - start, b - start, b in self.cuts) for a, b in pairwise(bounds))

    def scored(self, start: int, stop: int, stride: int) -> list[int]:
        """Positions from start to stop whose next token is scored: every ``stride``-th behind the first segment."""
        last = min(stop, self.length - 1)
        return [row for row in range(max(start, self.first), last) if (row - self.first) % stride == 0]


def plan(length: int, segment: int) -> ReadingPlan:
    """Two prompts and an answer, a third of the text each."""
    turns = length // 3, 2 * length // 3
    cuts = sorted({*range(segment, turns[1], segment), *turns})
    return ReadingPlan(length, cuts[0], turns[1], tuple(cuts))


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihoods of a text's tokens, in nats.

    Attributes:
        prompt: [P] float64 of tokens behind a prompt's, from the second segment on.
        decoded: [D] float64 of tokens behind a decoded one.
    """

    prompt: Tensor
    decoded: Tensor


class Meter:
    """Scores one text under forms of one model; the model is as it was after each.

    Args:
        model: without a layout.
        ids: the text.
        segment: prompt tokens that read a bank as one.
        on_work: told of work done, in the unit of the ``*_cost`` methods: one token in one layer.

    Raises:
        ConfigError: the text is too short to say anything.
    """

    def __init__(
        self, model: LoadedModel, ids: Sequence[int], segment: int, on_work: OnWork = lambda work: None
    ) -> None:
        if len(ids) < LEAST:
            raise ConfigError(f"nothing can be measured on {len(ids)} tokens; at least {LEAST} are needed")
        detach(model.module)
        unpatch(model.module)
        self._model, self._segment, self._on_work = model, segment, on_work
        self._ids = torch.tensor(list(ids))
        capacity = -(-len(ids) // BLOCK) * BLOCK + BLOCK  # tiles are read in whole blocks
        self._runs = (Run(0, 0, capacity),)
        self._keys = slab([shape[0] for shape in model.kv_shapes], capacity, model.dtype, model.device)
        self._values = slab([shape[1] for shape in model.kv_shapes], capacity, model.dtype, model.device)
        layers = decoder_layers(model.module)
        self._num_layers = len(layers)
        self._outputs = LayerOutputs(layers)
        self._size = min(_CHUNK, max(64, _LOGITS // model.vocab_size))
        weights = sum(weight.numel() for weight in layers.parameters()) / len(layers)
        head: Any = model.module.get_input_embeddings()  # type: ignore[operator]
        self._head = head.weight.numel() / weights

    # -- forms ---------------------------------------------------------------------------------------------

    def read_plain(self) -> None:
        """Read the text without banks: what forms are compared with, and go on from."""
        whole, scores = self.plan(), []
        for start, stop in whole.parts(self._size):
            rows = range(start, min(stop, whole.length - 1))
            with self._outputs.recording(stop - start):
                scores.append(self._pass(start, stop, rows))
            self._on_work(self._work(self._num_layers, stop - start, len(rows)))
        self._plain = torch.cat(scores)
        self._start = [slabs[:, : whole.first].clone() for slabs in (*self._keys, *self._values)]

    def plain(self, length: int | None = None, stride: int = 1) -> Scores:
        """What the plain model scores the first ``length`` tokens; every ``stride``-th of them."""
        found = self.plan(length)
        rows = found.scored(0, found.length, stride)
        return _split(found, rows, self._plain[rows])

    def banks(self, config: PAConfig, layers: Iterable[int], length: int | None = None, stride: int = 1) -> Scores:
        """The same with banks in ``layers``."""
        layers, found = sorted(layers), self.plan(length)
        model, scores = self._model, []
        try:
            shapes = patch(model.module, layers)
            pool = BankPool(config, shapes, num_rows=1, num_stages=1, dtype=model.dtype, device=model.device)
            row = pool.check_out()
            owned = Banks(pool.banks(row), pool.stages(row, config.preset), config.preset, row)
            for slabs, kept in zip((*self._keys, *self._values), self._start, strict=True):
                slabs[:, : kept.shape[1]] = kept
            for start, stop in found.parts(self._size):
                rows = found.scored(start, stop, stride)
                known = self._known(layers, stop <= found.first)
                with self._outputs.replaying(known, start, stop):
                    scores.append(self._pass(start, stop, rows, found, banks=owned, pa=config, arenas=pool.arena))
                self._on_work(self._work(self._num_layers - len(known), stop - start, len(rows)))
        finally:
            unpatch(model.module)
        return _split(found, found.scored(0, found.length, stride), torch.cat(scores))

    def densities(self, model: LoadedModel, densities: Sequence[float]) -> list[Scores]:
        """The answer's tokens where they use a part of their experts, for each of ``densities``.

        Args:
            model: the same with a layout, which has moved its weights, so that nothing else is measured after this.
        """
        assert model.layout is not None
        whole, layers = self.plan(), model.layout.layers
        heat = torch.stack([layers[layer].heat for layer in range(len(layers))])
        pool = BankPool(PAConfig(), [], num_rows=1, num_stages=1, dtype=model.dtype, device=model.device, heat=heat)
        row, results = pool.check_out(), []
        state, stage = (cast(Any, part[EXPERTS]) for part in (pool.banks(row), pool.stages(row)))
        assert pool.sets is not None
        attach(model.module, model.layout)
        try:
            for density in (1.0, *densities):  # the prompts once, then the answer for each
                experts, scores = Experts(state, stage, density, {}, pool.sets, row), [torch.empty(0)]
                for start, stop in whole.parts(self._size):
                    if (start < whole.answer) == (density == 1.0):
                        rows = whole.scored(start, stop, 1) if density < 1.0 else []
                        scores.append(self._pass(start, stop, rows, whole, experts=experts, sets=pool.sets))
                        self._on_work(self._work(self._num_layers, stop - start, len(rows)))
                results.append(Scores(torch.empty(0), torch.cat(scores)))
        finally:
            detach(model.module)
        return results[1:]

    # -- what it takes -------------------------------------------------------------------------------------

    def plan(self, length: int | None = None) -> ReadingPlan:
        """How the first ``length`` tokens are read, or all."""
        return plan(len(self._ids) if length is None else length, self._segment)

    def plain_cost(self) -> float:
        """Of :meth:`read_plain`."""
        return self._work(self._num_layers, len(self._ids), len(self._ids))

    def banks_cost(self, layers: Iterable[int], length: int | None = None, stride: int = 1) -> float:
        """Of :meth:`banks`."""
        layers, found = sorted(layers), self.plan(length)
        behind, known = found.length - found.first, len(self._known(layers, False))
        first = self._work(self._num_layers - len(self._known(layers, True)), found.first, 0)
        return first + self._work(self._num_layers - known, behind, behind // stride)

    def densities_cost(self, count: int) -> float:
        """Of :meth:`densities`."""
        whole = self.plan()
        answer = whole.length - whole.answer
        return self._work(self._num_layers, whole.answer, 0) + count * self._work(self._num_layers, answer, answer)

    def _work(self, layers: int, tokens: int, scored: int) -> float:
        return layers * tokens + self._head * scored

    # -- passes --------------------------------------------------------------------------------------------

    def _known(self, layers: Sequence[int], is_first: bool) -> list[int]:
        """Layers that give what the plain model's gave, with banks in ``layers``."""
        if not self._outputs.are_whole:
            return []
        return [
            number for number in range(self._num_layers) if number < layers[0] or (is_first and number not in layers)
        ]

    @torch.inference_mode()
    def _pass(
        self,
        start: int,
        stop: int,
        rows: Sequence[int],
        found: ReadingPlan | None = None,
        banks: Banks | None = None,
        experts: Experts | None = None,
        **more: Any,
    ) -> Tensor:
        """[R] float64: scores of what follows positions ``rows``, by a forward pass of tokens start to stop."""
        device, count = self._model.device, stop - start
        chunk = Chunk(0, count, start, self._runs, banks=banks, experts=experts)
        if found is not None and experts is not None and start >= found.answer:
            chunk = dataclasses.replace(chunk, num_decoded=count)
        elif found is not None:
            chunk = dataclasses.replace(chunk, pieces=found.pieces(start, stop))
        pad = (0, missing_rows(count))
        ids = torch.nn.functional.pad(self._ids[start:stop], pad).to(device)
        positions = torch.nn.functional.pad(torch.arange(start, stop), pad).to(device)
        wanted = [row - start for row in rows]
        step = StepContext([chunk], self._keys, self._values, wanted=wanted, **more)
        with step_context(step):
            output = self._model.module(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=padded(wanted, device),
            )
        following = self._ids[[row + 1 for row in rows]].to(device)
        logits = output.logits[0, : len(wanted)]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        known = logits.gather(1, following[:, None])[:, 0]
        return (logits.logsumexp(1) - known).double().cpu()


def _split(found: ReadingPlan, rows: Sequence[int], scores: Tensor) -> Scores:
    count = sum(row < found.answer for row in rows)
    return Scores(scores[:count], scores[count:])
