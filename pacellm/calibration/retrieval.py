"""Which layers' attention finds what a question is about, and whose activity does: found with planted facts.

A question is asked as working memory asks it: its tokens see the beginning and a window, never the fact, and the
index votes over all of the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pacellm.calibration.planted import PART, SINKS, Planted
from pacellm.kv.history import History, HistoryBlock
from pacellm.model.attention.dispatch import slab
from pacellm.model.context import Asked, Chunk, Run, StepContext, current_step, step_context
from pacellm.model.load import LoadedModel
from pacellm.model.neurons import ffns
from pacellm.model.retrieval import CodeBook, Coder
from pacellm.model.rotation import KeyRotation
from pacellm.recall.activity import activity_votes
from pacellm.recall.attention import attention_mass
from pacellm.rows import missing_rows
from pacellm.run.batch import padded
from pacellm.view import BLOCK

_CHUNK = 512
OnWork = Callable[[float], None]
DISTANCE = 1024
"""Tokens between a question and every key, as a vote by attention sees them."""
BITS, SEED = 256, 0
_FLOOR = 1e-2  # of the mean deviation


class Moments:
    """Means and deviations of every FFN's inner activations, of the tokens that pass while it looks.

    Attributes:
        books: how codes of each layer's activity are made, once it has looked.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._ffns = [ffn for ffn in ffns(model.module)[:-1] if ffn is not None]
        self._sums: dict[int, Tensor] = {}
        self._count: dict[int, int] = {}

    def __enter__(self) -> Moments:
        self._hooks = [ffn.down.register_forward_pre_hook(_each_row(ffn.layer, self._add)) for ffn in self._ffns]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, layer: int, inner: Tensor) -> None:
        wide = inner.double()
        sums = torch.stack([wide.sum(0), wide.square().sum(0)])
        self._sums[layer] = sums + self._sums.get(layer, 0.0)
        self._count[layer] = self._count.get(layer, 0) + len(inner)

    @property
    def books(self) -> dict[int, CodeBook]:
        found = {}
        for layer, sums in self._sums.items():
            mean, square = sums / self._count[layer]
            deviation = (square - mean.square()).clamp(min=0).sqrt()
            deviation = deviation.clamp(min=max(_FLOOR * float(deviation.mean()), 1e-12))
            found[layer] = CodeBook(layer, mean.float().cpu(), deviation.float().cpu(), BITS, SEED)
        return found


def _each_row(layer: int, see: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(module: object, given: tuple[Tensor, ...]) -> None:
        step = current_step()
        if step is not None and step.chunks:
            see(layer, given[0].flatten(0, -2)[: step.chunks[-1].stop])

    return hook


class Asking:
    """Reads planted prompts and asks their questions.

    Args:
        model: unpatched.
        rotations: how its keys turn, by layer.
        books: how codes are made, by layer.
    """

    def __init__(
        self,
        model: LoadedModel,
        rotations: Sequence[KeyRotation | None],
        books: dict[int, CodeBook],
        on_work: OnWork = lambda work: None,
    ) -> None:
        self._model, self._rotations, self._on_work = model, rotations, on_work
        self._coders = {layer: Coder(book, model.device) for layer, book in books.items()}
        self._layers = tuple(layer for layer, window in enumerate(model.windows) if window is None)

    @torch.inference_mode()
    def votes(self, planted: Planted) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """By layer [questions, blocks] votes of attention, and of activity."""
        length, size = len(planted.ids), len(planted.questions[0])
        total = size * len(planted.questions)
        slots = -(-(length + total) // BLOCK) * BLOCK + BLOCK
        shapes, model = self._model.kv_shapes, self._model
        keys, values = (slab([one[part] for one in shapes], slots, model.dtype, model.device) for part in (0, 1))
        codes: dict[int, list[Tensor]] = {layer: [] for layer in self._coders}

        def encode(layer: int, inner: Tensor) -> None:
            codes[layer].append(self._coders[layer](inner).cpu())

        hooks = [
            ffn.down.register_forward_pre_hook(_each_row(ffn.layer, encode))
            for ffn in ffns(model.module)
            if ffn is not None and ffn.layer in self._coders
        ]
        try:
            for start in range(0, length, _CHUNK):
                stop = min(start + _CHUNK, length)
                chunk = Chunk(0, stop - start, start, (Run(0, 0, slots),))
                self._pass(planted.ids[start:stop], range(start, stop), [chunk], keys, values)
            seen = SINKS + planted.window
            front = Run(0, 0, SINKS), Run(SINKS, length - planted.window, planted.window)
            chunks = [
                Chunk(row, row + size, seen, (*front, Run(seen, length + row, BLOCK)), asked=Asked(self._layers))
                for row in range(0, total, size)
            ]
            asked = [token for question in planted.questions for token in question]
            positions = [length + place for _ in planted.questions for place in range(size)]
            self._pass(asked, positions, chunks, keys, values)
        finally:
            for hook in hooks:
                hook.remove()
        end = length - planted.window
        history = _history(keys, end)
        attention = {layer: self._attention(layer, chunks, positions, history, end) for layer in self._layers}
        return attention, {layer: _activity(torch.cat(found).numpy(), length, size, end) for layer, found in codes.items()}

    def _attention(self, layer, chunks, positions, history, end):
        queries = torch.cat([chunk.asked.queries[layer] for chunk in chunks], 1)
        mass = attention_mass(queries, chunks[0].asked.scales[layer], positions, history, layer, end, self._rotations[layer],
                              distance=DISTANCE, block=PART)
        each = mass.unflatten(2, (len(chunks), -1)).mean((1, 3))
        return each.amax(0).cpu().numpy()

    def _pass(self, ids, positions, chunks, keys, values) -> None:
        device = self._model.device
        pad = (0, missing_rows(len(ids)))
        rows = torch.nn.functional.pad(torch.tensor(ids), pad).to(device)
        places = torch.nn.functional.pad(torch.tensor(list(positions)), pad).to(device)
        with step_context(StepContext(chunks, keys, values, wanted=[0])):
            self._model.module(input_ids=rows[None], position_ids=places[None], use_cache=False,
                               logits_to_keep=padded([0], device))
        self._on_work(len(ids))


def _history(keys: list[Tensor], end: int) -> History:
    blocks = []
    for start in range(0, end, BLOCK):
        block = HistoryBlock(keys)
        for target, source in zip(block.parts, keys, strict=True):
            target.copy_(source[:, start : start + BLOCK])
        blocks.append(block)
    return History(blocks)


def _activity(codes: np.ndarray, length: int, size: int, end: int) -> np.ndarray:
    asked = codes[length:].reshape(-1, size, codes.shape[1])
    return np.stack([activity_votes(one, codes[:end], PART) for one in asked])
