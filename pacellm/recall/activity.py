"""Votes by activity: blocks with tokens that did in an FFN what the question's tokens do."""

from __future__ import annotations

import numpy as np

_SHARPNESS = 0.1


def activity_votes(question: np.ndarray, history: np.ndarray, block: int) -> np.ndarray:
    """[T / block] float64: :func:`votes_by_bits` of codes.

    Args:
        question: [n, bytes] uint8 codes. history: [T, bytes] uint8, T a multiple of ``block``.
    """
    return votes_by_bits(differing_bits(question, history, block), 8 * question.shape[1])


def differing_bits(question: np.ndarray, history: np.ndarray, block: int) -> np.ndarray:
    """[n, T / block] uint16: the bits in which a token's code and the nearest one of a block differ.

    Args:
        question, history: as of :func:`activity_votes`.
    """
    asked, kept = _words(question), _words(history)
    found = np.empty((len(asked), len(kept) // block), np.uint16)
    for number, one in enumerate(asked):
        differing = np.bitwise_count(kept ^ one).sum(1, dtype=np.uint16)
        found[number] = differing.reshape(-1, block).min(1)
    return found


def votes_by_bits(differing: np.ndarray, bits: int) -> np.ndarray:
    """[blocks] float64: the sum over the question's tokens of softmax(r / 0.1) over blocks, r being the best likeness
    of any token of a block, 1 - 2 (bits that differ) / bits.

    Args:
        differing: [n, blocks]. bits: of a code.
    """
    votes = np.zeros(differing.shape[1])
    for one in differing:
        likeness = 1.0 - 2.0 * one / bits
        weights = np.exp((likeness - likeness.max()) / _SHARPNESS)
        votes += weights / weights.sum()
    return votes


def _words(codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes).view(np.uint64)
