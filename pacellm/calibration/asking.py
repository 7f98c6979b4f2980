"""Questions about planted facts, asked as working memory asks them: their tokens see a prompt's beginning and a window,
never a fact, and an index votes over what lies before the window."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pacellm.calibration.file import KINDS
from pacellm.calibration.planted import PART, SINKS, WINDOW, Planted
from pacellm.kv.history import History, HistoryBlock, empty_parts
from pacellm.model.attention.dispatch import slab
from pacellm.model.context import Asked, Chunk, Run, StepContext, current_step, step_context
from pacellm.model.load import LoadedModel
from pacellm.model.neurons import ffns
from pacellm.model.retrieval import CodeBook, Coder
from pacellm.model.rotation import KeyRotation, learn_rotations
from pacellm.recall.activity import activity_votes
from pacellm.recall.attention import attention_mass, votes_by_mass
from pacellm.recall.hubs import without_hubs
from pacellm.recall.lexical import lexical_votes
from pacellm.rows import missing_rows
from pacellm.run.batch import padded
from pacellm.view import BLOCK

BITS, SEED = 256, 0
_CHUNK = 512
_DISTANCE = 1024  # tokens between a question and every key, as its vote sees them
_FLOOR = 1e-2  # of the mean deviation: a neuron that the text leaves alone is not to outweigh the others
OnWork = Callable[[float], None]
See = Callable[[int, Tensor], None]


class Voted(NamedTuple):
    """Votes of one layer, or of several together.

    Attributes:
        asked: [kinds, facts, blocks]. nulls: [null questions, blocks].
    """

    asked: np.ndarray
    nulls: np.ndarray

    def compared(self) -> np.ndarray:
        """[kinds, facts, blocks] as an index takes them: by how much they differ from those of null questions."""
        return without_hubs(self.asked, self.nulls)


Votes = Mapping[int, Voted]
"""By layer."""


@contextmanager
def watching(model: LoadedModel, see: See, layers: Sequence[int]) -> Iterator[None]:
    """Inside, have ``see`` told a layer and its FFN's inner activations [n, F] of each step's tokens."""

    def hook(layer: int) -> Callable[..., None]:
        def look(down: object, given: tuple[Tensor, ...]) -> None:
            step = current_step()
            if step is not None and step.chunks:
                see(layer, given[0].flatten(0, -2)[: step.chunks[-1].stop])

        return look

    found = [ffn for ffn in ffns(model.module) if ffn is not None and ffn.layer in layers]
    hooks = [ffn.down.register_forward_pre_hook(hook(ffn.layer)) for ffn in found]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


class Moments:
    """Means and deviations of inner activations, of the tokens that pass inside :meth:`watching`."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._sums, self._tokens = model, dict[int, Tensor](), dict[int, int]()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every layer that codes can be of: those with an FFN that every token passes, but the last, whose
        FFN is left out where nobody reads its output."""
        layers = [ffn.layer for ffn in ffns(self._model.module)[:-1] if ffn is not None]
        with watching(self._model, self._add, layers):
            yield

    def _add(self, layer: int, inner: Tensor) -> None:
        wide = inner.double()
        sums = torch.stack([wide.sum(0), wide.square().sum(0)]).cpu()
        self._sums[layer] = self._sums.get(layer, 0.0) + sums
        self._tokens[layer] = self._tokens.get(layer, 0) + len(inner)

    def books(self) -> dict[int, CodeBook]:
        """By layer how its codes are made."""
        found = {}
        for layer, sums in self._sums.items():
            mean, square = sums / self._tokens[layer]
            deviation = (square - mean.square()).clamp(min=0).sqrt()
            least = max(_FLOOR * float(deviation.mean()), 1e-6)
            found[layer] = CodeBook(layer, mean.float(), deviation.clamp(min=least).float(), BITS, SEED)
        return found


class _Question(NamedTuple):
    """Rows of one question among all, and its tokens."""

    rows: slice
    ids: tuple[int, ...]


class Asking:
    """Has indexes vote for the questions of planted prompts.

    Args:
        model: unpatched and without a layout.
        books: of the codes, by layer.
        nulls: ids of null questions, which are asked of the first prompt.
        on_work: told of tokens, each once for each layer.

    Attributes:
        null_queries: by layer, of the null questions [H, n, D], turned to position 0. null_codes: by layer [n, bytes].

    Raises:
        ConfigError: the model's keys cannot be shown at other positions, so it has no working memory.
    """

    def __init__(
        self,
        model: LoadedModel,
        books: Mapping[int, CodeBook],
        nulls: Sequence[Sequence[int]] = (),
        on_work: OnWork = lambda work: None,
    ) -> None:
        self._model, self._on_work, self._nulls = model, on_work, [tuple(one) for one in nulls]
        self.null_queries: dict[int, Tensor] = {}
        self.null_codes: dict[int, np.ndarray] = {}
        self._rotations: list[KeyRotation | None] = learn_rotations(model)
        self._coders = {layer: Coder(book, model.device) for layer, book in books.items()}
        self._layers = tuple(layer for layer, window in enumerate(model.windows) if window is None)

    @torch.inference_mode()
    def votes(self, planted: Planted) -> tuple[Votes, Votes]:
        """Of attention, and of activity codes."""
        is_first = not self.null_codes and not self.null_queries
        questions = questions_of(planted)
        asked = [*questions, *_rows(self._nulls, questions[-1].rows.stop)] if is_first else questions
        self._begin(planted, asked)
        codes: dict[int, list[Tensor]] = {layer: [] for layer in self._coders}

        def encode(layer: int, inner: Tensor) -> None:
            codes[layer].append(self._coders[layer](inner).cpu())

        with watching(self._model, encode, tuple(codes)):
            self._read(planted)
            chunks = self._ask(planted, asked)
        found = {layer: torch.cat(parts).numpy() for layer, parts in codes.items()}
        if is_first:
            self._learn_nulls(planted, chunks[len(questions) :], found)
        history = _history(self._keys, planted.end)
        attention = {
            layer: self._attention(layer, chunks[: len(questions)], history, planted) for layer in self._layers
        }
        return attention, {layer: self._activity(layer, one, questions, planted) for layer, one in found.items()}

    def _learn_nulls(self, planted: Planted, chunks: Sequence[Chunk], codes: Mapping[int, np.ndarray]) -> None:
        count = sum(map(len, self._nulls))
        if not count:
            return
        self.null_codes = {layer: one[-count:] for layer, one in codes.items()}
        positions = torch.tensor(_positions(planted, chunks))
        for layer in self._layers:
            queries = torch.cat([_asked(chunk).queries[layer] for chunk in chunks], 1)
            rotation = self._rotations[layer]
            self.null_queries[layer] = queries if rotation is None else rotation.moved(queries, -positions)

    def _begin(self, planted: Planted, questions: Sequence[_Question]) -> None:
        model, last = self._model, questions[-1].rows.stop
        slots = -(-(len(planted.ids) + last) // BLOCK) * BLOCK + BLOCK  # tiles are read in whole blocks
        self._keys = slab([shape[0] for shape in model.kv_shapes], slots, model.dtype, model.device)
        self._values = slab([shape[1] for shape in model.kv_shapes], slots, model.dtype, model.device)

    def _read(self, planted: Planted) -> None:
        runs = (Run(0, 0, self._keys[0].shape[1]),)
        for start in range(0, len(planted.ids), _CHUNK):
            ids = planted.ids[start : start + _CHUNK]
            self._pass(ids, range(start, start + len(ids)), [Chunk(0, len(ids), start, runs)])

    def _ask(self, planted: Planted, questions: Sequence[_Question]) -> list[Chunk]:
        """Every question by itself, behind the same prompt."""
        length, seen = len(planted.ids), SINKS + WINDOW
        front = Run(0, 0, SINKS), Run(SINKS, planted.end, WINDOW)
        chunks = [
            Chunk(rows.start, rows.stop, seen, (*front, Run(seen, length + rows.start, BLOCK)),
                  asked=Asked(self._layers))
            for rows, _ in questions
        ]  # fmt: skip
        ids = [token for question in questions for token in question.ids]
        self._pass(ids, [length + place for question in questions for place in range(len(question.ids))], chunks)
        return chunks

    def _pass(self, ids: Sequence[int], positions: Sequence[int], chunks: list[Chunk]) -> None:
        device, pad = self._model.device, (0, missing_rows(len(ids)))
        rows, places = (torch.nn.functional.pad(torch.tensor(list(one)), pad).to(device) for one in (ids, positions))
        with step_context(StepContext(chunks, self._keys, self._values, wanted=[0])):
            self._model.module(
                input_ids=rows[None], position_ids=places[None], use_cache=False, logits_to_keep=padded([0], device)
            )
        self._on_work(self._model.num_layers * len(ids))

    def _attention(self, layer: int, chunks: Sequence[Chunk], history: History, planted: Planted) -> Voted:
        queries = [_asked(chunk).queries[layer] for chunk in chunks]
        if self._nulls:
            queries.append(self.null_queries[layer])
        lengths = [chunk.stop - chunk.start for chunk in chunks] + [len(one) for one in self._nulls]
        positions = [*_positions(planted, chunks), *([0] * sum(map(len, self._nulls)))]
        mass = attention_mass(
            torch.cat(queries, 1), _asked(chunks[0]).scales[layer], positions, history, layer, planted.end,
            self._rotations[layer], distance=_DISTANCE, block=PART,
        )  # fmt: skip
        return _voted(votes_by_mass(mass, lengths).cpu().numpy(), planted)

    def _activity(self, layer: int, codes: np.ndarray, questions: Sequence[_Question], planted: Planted) -> Voted:
        own, history = codes[len(planted.ids) :], codes[: planted.end]
        asked = [own[question.rows] for question in questions]
        if self._nulls:
            asked += [self.null_codes[layer][null.rows] for null in _rows(self._nulls, 0)]
        return _voted(np.stack([activity_votes(one, history, PART) for one in asked]), planted)


def _asked(chunk: Chunk) -> Asked:
    assert chunk.asked is not None
    return chunk.asked


def _positions(planted: Planted, chunks: Sequence[Chunk]) -> list[int]:
    """Of questions' tokens, each question right behind the prompt."""
    return [len(planted.ids) + place for chunk in chunks for place in range(chunk.stop - chunk.start)]


def _voted(votes: np.ndarray, planted: Planted) -> Voted:
    """Votes [questions and null questions, blocks] apart."""
    count = len(KINDS) * len(planted.facts)
    return Voted(votes[:count].reshape(len(KINDS), len(planted.facts), -1), votes[count:])


def questions_of(planted: Planted) -> list[_Question]:
    """All of one kind, then all of the other."""
    return _rows([fact.asked[kind] for kind in range(len(KINDS)) for fact in planted.facts], 0)


def _rows(questions: Sequence[tuple[int, ...]], first: int) -> list[_Question]:
    ends = [first, *itertools.accumulate(map(len, questions), initial=first)][1:]
    return [_Question(slice(start, start + len(ids)), ids) for start, ids in zip(ends, questions, strict=False)]


def _history(keys: Sequence[Tensor], end: int) -> History:
    blocks = []
    for start in range(0, end, BLOCK):
        blocks.append(HistoryBlock(empty_parts(keys)))
        for target, source in zip(blocks[-1].parts, keys, strict=True):
            target.copy_(source[:, start : start + BLOCK])
    return History(blocks)


def lexical(planted: Planted) -> np.ndarray:
    """[kinds, facts, blocks] votes by words."""
    votes = []
    for question in questions_of(planted):
        ids = array("i", [*planted.ids, *question.ids])
        votes.append(lexical_votes(ids, range(len(planted.ids), len(ids)), planted.end, PART))
    return np.stack(votes).reshape(len(KINDS), len(planted.facts), -1)
