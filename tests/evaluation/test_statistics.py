import numpy as np
import pytest

from pacellm.evaluation.statistics import bootstrap, holm, mean_of_tasks, sign_flip


def test_documents_are_drawn_whole():
    mean = bootstrap({"a": [1.0] * 50, "b": [0.0] * 50})
    assert (mean.value, mean.low, mean.high, mean.documents) == (0.5, 0.0, 1.0, 2)
    alike = bootstrap({"a": [0.0, 1.0], "b": [1.0, 0.0]})
    assert (alike.value, alike.low, alike.high) == (0.5, 0.5, 0.5)


def test_intervals_are_as_wide_as_theory_has_them():
    values = np.random.default_rng(1).normal(size=400)
    mean = bootstrap({str(number): [float(value)] for number, value in enumerate(values)})
    half = 1.96 * values.std() / 20
    assert mean.low == pytest.approx(mean.value - half, abs=0.02)
    assert mean.high == pytest.approx(mean.value + half, abs=0.02)


def test_tasks_count_the_same():
    mean = mean_of_tasks([{str(number): [1.0] for number in range(30)}, {"a": [0.0], "b": [0.0]}])
    assert (mean.value, mean.low, mean.high) == (0.5, 0.5, 0.5)


def test_signs():
    assert sign_flip({str(number): [1.0] for number in range(5)}) == 2 / 32
    assert sign_flip({"a": [1.0, -1.0], "b": [0.0]}) == 1.0
    assert sign_flip({str(number): [1.0] for number in range(30)}) < 0.001
    balanced = {str(number): [float(number % 2 * 2 - 1)] for number in range(30)}
    assert sign_flip(balanced) == pytest.approx(1.0)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
