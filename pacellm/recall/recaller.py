"""Chooses what a question calls back of a history beyond its budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from pacellm.config import IndexName
from pacellm.engine.sequence import Sequence
from pacellm.kv.history import History
from pacellm.model.context import Asked
from pacellm.model.retrieval import Nulls, Retrieval
from pacellm.model.rotation import KeyRotation
from pacellm.recall.activity import activity_votes, votes_by_bits
from pacellm.recall.attention import attention_mass, votes_by_mass
from pacellm.recall.hits import HitMeter
from pacellm.recall.hubs import NullBits, without_hubs
from pacellm.recall.lexical import lexical_votes
from pacellm.types import Passage
from pacellm.view import BLOCK, Recall, Span

_SHOWN = 8  # passages
_LIKE_THE_BEST: dict[IndexName, float] = {"lexical": 0.9, "activity": 0.5, "attention": 0.5}
"""Part of an index's most votes from which on a block comes back by itself. A text about like things states them in
like words, and a small model takes one for the other, so by words only what is as good as the best does."""


class Recaller:
    """Has indexes vote, and calls back the blocks with most votes.

    Args:
        indexes: which; several share what is called back evenly.
        retrieval: what they need of the model.
        rotations: how keys turn, by layer. slabs: KV memory.
        block: tokens of a block that is called back; a part of ``BLOCK``.
        room: tokens that are called back.
        distance: tokens between a question and a key, as attention scores it.

    Attributes:
        hits: measures whether what is called back is used.
    """

    def __init__(
        self,
        indexes: Items[IndexName],
        retrieval: Retrieval,
        rotations: Items[KeyRotation | None],
        slabs: Items[Tensor],
        *,
        block: int,
        room: int,
        distance: int,
    ) -> None:
        self._indexes, self._retrieval, self._rotations = tuple(indexes), retrieval, rotations
        self._block, self._room, self._distance = block, room, distance
        codes = retrieval.nulls.codes
        self._null_bits = None if codes is None else NullBits(codes, block)
        self.hits = HitMeter(retrieval.layers, slabs, rotations)

    @property
    def looks_at(self) -> tuple[int, ...] | None:
        """Layers whose attention to a question is wanted; None where the question need not be run."""
        if self._indexes == ("lexical",):
            return None
        return self._retrieval.layers if "attention" in self._indexes else ()

    def choose(self, sequence: Sequence, asked: Asked | None = None) -> Recall:
        """Have it noted on a sequence what its question calls back."""
        budget, question = sequence.turn.budget, sequence.question
        assert budget is not None
        assert question is not None
        recall = Recall.recent(budget)
        if question:
            end = budget.reading(question.start).start
            votes = [self.votes(index, sequence, question, end, asked) for index in self._indexes]
            least = [_LIKE_THE_BEST[index] for index in self._indexes]
            spans = chosen(votes, least, min(budget.room, self._room), self._block)
            recall = Recall(question.start, spans, budget)
            sequence.passages = self._passages(votes, sequence)
            self.hits.begin(sequence)
        sequence.recalls(recall)
        return recall

    def _passages(self, votes: Items[np.ndarray], sequence: Sequence) -> tuple[Passage, ...]:
        """The blocks with most votes, each index's in turn."""
        found: dict[int, Passage] = {}
        orders = [np.argsort(-one, kind="stable")[:_SHOWN].tolist() for one in votes]
        for turn in zip(*orders, strict=True):
            for index, one, number in zip(self._indexes, votes, turn, strict=True):
                start, end = number * self._block, (number + 1) * self._block
                ids = tuple(sequence.prompt[start:end])
                found.setdefault(number, Passage(start, end, float(one[number]), index, ids))
        return tuple(found.values())[:_SHOWN]

    def votes(self, index: IndexName, sequence: Sequence, question: range, end: int, asked: Asked | None) -> np.ndarray:
        """[end / block] an index's votes for the history's first ``end`` tokens."""
        history = sequence.table.history
        if index == "lexical":
            return lexical_votes(sequence.prompt, question, end, self._block)
        assert asked is not None
        return (
            self._activity(asked, history, end)
            if index == "activity"
            else self._attention(asked, question, history, end)
        )

    def _activity(self, asked: Asked, history: History, end: int) -> np.ndarray:
        assert asked.codes is not None
        codes = asked.codes.cpu().numpy()
        votes = activity_votes(codes, _codes(history, end), self._block)
        if self._null_bits is None:
            return votes
        bits = self._null_bits.of(history, end)
        return without_hubs(
            votes, [votes_by_bits(bits[rows], 8 * codes.shape[1]) for rows in self._retrieval.nulls.rows]
        )

    def _attention(self, asked: Asked, question: range, history: History, end: int) -> np.ndarray:
        """Over layers and KV heads, the largest mean of the mass that the question's tokens put on each block."""
        nulls = self._retrieval.nulls if set(asked.layers) <= self._retrieval.nulls.queries.keys() else Nulls()
        positions = [*question, *([0] * sum(nulls.lengths))]
        found: list[Tensor] = []
        for layer in asked.layers:
            queries = asked.queries[layer]
            if nulls.lengths:
                queries = torch.cat([queries, nulls.queries[layer].to(queries)], 1)
            mass = attention_mass(
                queries, asked.scales[layer], positions, history, layer, end, self._rotations[layer],
                distance=self._distance, block=self._block,
            )  # fmt: skip
            found.append(votes_by_mass(mass, [len(question), *nulls.lengths]))
        votes, *others = torch.stack(found).amax(0).cpu().numpy()
        return without_hubs(votes, others)


def chosen(votes: Items[np.ndarray], least: Items[float], room: int, block: int) -> tuple[Span, ...]:
    """The first block of the history, and of the others those with most votes, with what stands around them, in order.

    A block with votes near an index's most is a seed. Seeds grow evenly until the room is full, so a question that
    one block answers gets that one's surroundings, not those that merely look alike: a small model mistakes them.

    Args:
        votes: by index [n] of blocks of ``block`` tokens; their seeds take turns.
        least: by index the part of its most votes that makes a seed.
        room: tokens that may be called back.
    """
    taken = set(range(BLOCK // block))
    count, total = len(taken) + room // block, len(votes[0])
    seeds = _seeds(votes, least, len(taken), max(1, room // block // 2))
    for step in _steps(total):
        for seed in seeds:
            if 0 <= seed + step < total and len(taken) < count:
                taken.add(seed + step)
    return tuple(_joined(sorted(taken), block))


def _seeds(votes: Items[np.ndarray], least: Items[float], first: int, most: int) -> list[int]:
    """Of the blocks from ``first`` on: those before are seen in any case."""
    orders = []
    for one, part in zip(votes, least, strict=True):
        order = first + np.argsort(-one[first:], kind="stable")[:most]
        orders.append([int(number) for number in order if one[number] >= part * one[order[0]]])
    turns = itertools.zip_longest(*orders)
    return list(dict.fromkeys(number for turn in turns for number in turn if number is not None))[:most]


def _steps(total: int) -> Iterator[int]:
    """0, then outwards, twice as far behind as before: what a block begins goes on in the next ones."""
    yield 0
    behind = before = 0
    while max(behind, before) < total:
        yield behind + 1
        yield behind + 2
        yield -(before + 1)
        behind, before = behind + 2, before + 1


def _codes(history: History, end: int) -> np.ndarray:
    return np.concatenate([block.parts[-1][0].numpy() for block in history.blocks[: end // BLOCK]])


def _joined(blocks: list[int], block: int) -> list[Span]:
    spans: list[Span] = []
    for number in blocks:
        if spans and spans[-1].end == number * block:
            spans[-1] = Span(spans[-1].start, spans[-1].length + block)
        else:
            spans.append(Span(number * block, block))
    return spans
