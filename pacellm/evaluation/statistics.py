"""Intervals and paired tests over documents."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
"""Bootstrap samples."""
_FLIPS = 20_000
"""Random signs of the permutation test, where there are too many to try all."""


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval.

    Attributes:
        documents: how many were drawn from; of a mean of tasks, in the task that has fewest. One alone says nothing of
            an interval.
    """

    value: float
    low: float
    high: float
    documents: int


def bootstrap(values: Mapping[str, Sequence[float]]) -> Mean:
    """The mean of all values, and its percentile interval over documents drawn with replacement.

    Args:
        values: by document, at least one in all.
    """
    sums, counts = _totals(values)
    drawn = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Mean(float(sums.sum() / counts.sum()), float(low), float(high), len(sums))


def mean_of_tasks(tasks: Sequence[Mapping[str, Sequence[float]]]) -> Mean:
    """The mean of tasks' means; documents are drawn within each task.

    Args:
        tasks: values by document, of each task, at least one in all.
    """
    value, means, rng = 0.0, np.zeros(DRAWS), np.random.default_rng(0)
    for values in tasks:
        sums, counts = _totals(values)
        drawn = rng.integers(0, len(sums), (DRAWS, len(sums)))
        value += float(sums.sum() / counts.sum()) / len(tasks)
        means += sums[drawn].sum(1) / counts[drawn].sum(1) / len(tasks)
    low, high = np.quantile(means, (0.025, 0.975))
    return Mean(value, float(low), float(high), min(map(len, tasks)))


def sign_flip(differences: Mapping[str, Sequence[float]]) -> float:
    """p of a paired difference, two-sided: how often documents' differences with signs by lot sum to as much.

    All signs are tried for up to 14 documents that differ, 20,000 drawn for more.

    Args:
        differences: by document.
    """
    sums = np.array([total for one in differences.values() if (total := sum(one))])
    if not len(sums):
        return 1.0
    if len(sums) <= 14:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (_FLIPS, len(sums)))
    as_much = int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return as_much / len(signs) if len(sums) <= 14 else (as_much + 1) / (_FLIPS + 1)


def holm(values: Sequence[float]) -> list[float]:
    """p-values with Holm's correction, in their order."""
    corrected, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, values[index] * (len(values) - rank)))
        corrected[index] = worst
    return corrected


def _totals(values: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each document, [D] each."""
    known = [one for one in values.values() if one]
    return np.array([sum(one) for one in known], float), np.array([len(one) for one in known], float)
