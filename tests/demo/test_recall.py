"""Recall of the bundled model at length, as its card states it: minutes. ``make test-slow``."""

import pytest
import torch

from pacellm.demo import MODEL_PATH
from pacellm.demo.evaluate import examine, load_answerer, summarise

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("length", "documents", "target"), [(1024, 20, 0.99), (8192, 20, 0.99), (32768, 20, 0.97)])
def test_recall(length, documents, target):
    torch.set_num_threads(2)
    answerer = load_answerer(MODEL_PATH, None, 1.0)
    outcomes = [
        outcome
        for seed in range(documents)
        for outcome in examine(answerer, length, max(12, length // 256), 6, seed, turns=False)
    ]
    summary = summarise(outcomes)
    assert summary["questions"] >= 100
    assert summary["recall"] >= target, summary
