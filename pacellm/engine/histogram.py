"""A histogram that costs little to add to. One thread adds, any may look."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts values by size.

    Args:
        bounds: upper ends of the buckets, rising; a last one without an end is added.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = (*bounds, float("inf"))
        self.sum = 0.0
        self._counts = [0] * len(self.bounds)

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def up_to(self) -> list[int]:
        """For each bucket how many values are in it or in one before it."""
        return list(itertools.accumulate(self._counts))
