"""Votes by activity: blocks with tokens that did in an FFN what the question's tokens do."""

from __future__ import annotations

import numpy as np

_SHARPNESS = 0.1


def activity_votes(question: np.ndarray, history: np.ndarray, block: int) -> np.ndarray:
    """[T / block] float64: the sum over the question's tokens of softmax(r / 0.1) over blocks, r being the best
    likeness of any token of a block, 1 - 2 (bits that differ) / bits.

    Args:
        question: [n, bytes] uint8 codes. history: [T, bytes] uint8, T a multiple of ``block``.
    """
    asked, kept = _words(question), _words(history)
    bits = 8 * question.shape[1]
    votes = np.zeros(len(kept) // block)
    for one in asked:
        differing = np.bitwise_count(kept ^ one).sum(1, dtype=np.uint16)
        likeness = 1.0 - 2.0 * differing.reshape(-1, block).min(1) / bits
        weights = np.exp((likeness - likeness.max()) / _SHARPNESS)
        votes += weights / weights.sum()
    return votes


def _words(codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes).view(np.uint64)
