"""Blocks that any question is drawn to, whatever it is about: a vote counts by how much it differs from those for
questions about other things."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from pacellm.kv.history import History, HistoryBlock
from pacellm.recall.activity import differing_bits
from pacellm.view import BLOCK

_LEAST = 1e-9  # of a vote


def without_hubs(votes: np.ndarray, nulls: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """[.., n] float64: of each block how many times as many votes it got as for null questions, on geometric average;
    without these, the votes.

    Args:
        votes: [.., n] of questions. nulls: of each null question [n].
    """
    if not len(nulls):
        return votes
    asked, others = (np.log(np.asarray(one, np.float64) + _LEAST) for one in (votes, np.stack(list(nulls))))
    ratios: np.ndarray = np.exp(asked - others.mean(0))
    return ratios


class NullBits:
    """How far the codes of null questions are from blocks of histories, counted once for each block.

    Args:
        codes: [n, bytes] uint8. part: tokens of a block that is voted for.
    """

    def __init__(self, codes: np.ndarray, part: int) -> None:
        self._codes, self._part = codes, part
        self._known: WeakKeyDictionary[HistoryBlock, np.ndarray] = WeakKeyDictionary()

    def of(self, history: History, end: int) -> np.ndarray:
        """[n, end / part] uint16: the bits in which a null question's token and the nearest token of a block differ."""
        return np.concatenate([self._of(block) for block in history.blocks[: end // BLOCK]], 1)

    def _of(self, block: HistoryBlock) -> np.ndarray:
        found = self._known.get(block)
        if found is None:
            found = self._known[block] = differing_bits(self._codes, block.parts[-1][0].numpy(), self._part)
        return found
