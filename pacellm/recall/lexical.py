"""Votes by words: tokens that a question shares with a block, rare ones more. No torch."""

from __future__ import annotations

from array import array

import numpy as np


def lexical_votes(ids: array[int], question: range, end: int, block: int) -> np.ndarray:
    """[end / block] float64: a vote for each block of the history.

    A block's vote is the sum over the question's distinct tokens of ln(N / n), N blocks of which n have the token, if
    it has it; a token that stands in no block or in every one adds nothing.

    Args:
        ids: of the history and the question.
        question: its positions.
        end: tokens of the history that may be called back; whole blocks.
        block: tokens of a block.
    """
    numbers = np.frombuffer(ids, dtype=np.int32)
    asked = np.unique(numbers[question.start : question.stop])
    places = np.searchsorted(asked, numbers[:end])
    places[places == len(asked)] = 0
    is_asked = asked[places] == numbers[:end]
    blocks = np.flatnonzero(is_asked) // block
    has = np.zeros((end // block, len(asked)), dtype=bool)
    has[blocks, places[is_asked]] = True
    counts = has.sum(0)
    weights = np.where(counts > 0, np.log(len(has) / np.maximum(counts, 1)), 0.0)
    return has @ weights
