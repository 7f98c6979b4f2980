"""Sampling, parameter by parameter."""

from array import array
from collections import Counter

import pytest
import torch

from pacellm.errors import RequestError
from pacellm.run.sampler import choose, sample, uniform
from pacellm.types import SamplingParams

LOGITS = torch.tensor([0.0, 1.0, 3.0, 2.0, -1.0])


def draws(count=2000, logits=LOGITS, generated=(), prompt=(), **changes):
    params = SamplingParams(**changes)
    history = list(generated)
    return Counter(sample(logits, params, array("i", prompt), history, seed)[0] for seed in range(count))


def test_greedy_and_ties():
    assert set(draws(5, temperature=0)) == {2}
    assert set(draws(5, logits=torch.ones(4), temperature=0)) == {0}


def test_frequencies_follow_the_softmax():
    counts, expected = draws(), LOGITS.softmax(-1)
    for token in range(5):
        assert counts[token] / 2000 == pytest.approx(float(expected[token]), abs=0.035)


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"top_k": 2}, {2, 3}),
        ({"top_k": 1}, {2}),
        ({"top_p": 0.6}, {2}),
        ({"top_p": 0.7}, {2, 3}),
        ({"min_p": 0.3}, {2, 3}),
        ({"temperature": 0.01}, {2}),
        ({"logit_bias": ((4, 100.0),)}, {4}),
    ],
)
def test_what_is_cut_never_comes(changes, allowed):
    assert set(draws(300, **changes)) == allowed


def test_penalties():
    assert set(draws(5, temperature=0, generated=[2], presence_penalty=1.5)) == {3}
    assert set(draws(5, temperature=0, generated=[2], frequency_penalty=0.9)) == {2}
    assert set(draws(5, temperature=0, generated=[2, 2], frequency_penalty=0.9)) == {3}
    assert set(draws(5, temperature=0, prompt=[2], repetition_penalty=2.0)) == {3}
    assert set(draws(5, temperature=0, prompt=[2], presence_penalty=2.0)) == {2}


def test_same_seed_same_text_and_every_step_its_own_draw():
    params = SamplingParams(temperature=1.5)
    text = [sample(LOGITS, params, array("i"), [0] * step, 11)[0] for step in range(40)]
    assert text == [sample(LOGITS, params, array("i"), [0] * step, 11)[0] for step in range(40)]
    assert len(set(text)) > 2


def test_logits_are_not_changed_and_must_be_finite():
    before = LOGITS.clone()
    draws(3, generated=[2], presence_penalty=1.0, logit_bias=((1, 5.0),), prompt=[1], repetition_penalty=1.3)
    assert torch.equal(before, LOGITS)
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor([0.0, torch.nan]), SamplingParams(), array("i"), [], 0)


def test_rows_are_drawn_together_as_they_are_alone():
    logits = torch.randn(40, 977, generator=torch.Generator().manual_seed(1)) * 3
    kinds = [{}, {"temperature": 0}, {"temperature": 0.3, "top_k": 5}, {"top_p": 0.4}, {"min_p": 0.2, "top_k": -1},
             {"temperature": 1.7, "top_p": 0.9, "min_p": 0.01}]  # fmt: skip
    params = [SamplingParams(**kinds[row % len(kinds)]) for row in range(40)]
    points = [uniform(row, 3) for row in range(40)]
    together = choose(logits, params, points).tolist()
    alone = [sample(logits[row], params[row], array("i"), [0] * 3, row)[0] for row in range(40)]
    assert together == alone
    assert len(set(together)) > 20


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, float("nan"), float("inf")]),
        ("top_p", [0.0, 1.1, -1.0]),
        ("top_k", [-2, 2**31]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [2.5]),
        ("repetition_penalty", [0.0, -1.0, float("inf")]),
        ("max_tokens", [-1, 2**31]),
        ("seed", [2**63]),
        ("stop", [("",), ("x",) * 17, ("y" * 1025,)]),
        ("logit_bias", [((-1, 0.0),), ((1, 101.0),), ((1, float("nan")),)]),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{field: value})
        assert caught.value.param == field
