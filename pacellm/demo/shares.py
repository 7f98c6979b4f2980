"""Shares of right answers and how sure they are."""

from __future__ import annotations

import math


def interval(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z, share = 1.96, right / asked
    centre = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, centre - half), min(1.0, centre + half)
