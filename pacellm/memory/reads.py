"""What reads of a bank come to, and the rates that are told of it: by the API, in dashboards, after the demo."""

from __future__ import annotations

from collections.abc import Mapping

OUTCOMES = {"hits": "hit", "fuses": "fuse", "misses": "miss", "empty": "empty"}
"""By counter, what one read that it counts is called."""


def rates(counts: Mapping[str, int]) -> dict[str, float | None]:
    """``hit_rate``, ``fuse_rate``, ``miss_rate`` and ``empty_rate``: each outcome's part of all reads, so they add up
    to 1. A read is one token at one layer. None where there were none.

    Args:
        counts: by counter; those that are missing are 0.
    """
    reads = sum(counts.get(name, 0) for name in OUTCOMES)
    return {f"{word}_rate": counts.get(name, 0) / reads if reads else None for name, word in OUTCOMES.items()}
