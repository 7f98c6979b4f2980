"""Decode steps that are launched before the last one's tokens are read: nothing comes out differently."""

import dataclasses

import pytest
import torch

from pacellm.engine.engine import run_until_idle
from pacellm.errors import SessionDeleted
from pacellm.experts.apply import apply_layout
from pacellm.model.load import prepare
from pacellm.run.runner import StepFailed
from pacellm.types import Admitted, Delta, Failed, SamplingParams
from tests.engine.helpers import (
    assert_nothing_held,
    assert_same_banks,
    banks,
    finish,
    new_engine,
    prompt,
    request,
    run,
    tokens,
    use_static_decode,
)
from tests.experts.test_layout import random_layout
from tests.models import tiny

LONG = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    """It ends answers often: a fifth of its vocabulary are end tokens as good as any."""
    return dataclasses.replace(prepare(tiny("llama")), eos_token_ids=frozenset({5, 17, 40, 61, 77}))


def both(model, **changes):
    """An engine that runs ahead, and an ordinary one."""
    return use_static_decode(new_engine(model, **changes)), new_engine(model, **changes)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert tokens(found[name]) == tokens(expected[name]), name
        mine, theirs = finish(found[name]), finish(expected[name])
        assert (mine.reason, mine.usage, mine.stop_reason) == (theirs.reason, theirs.usage, theirs.stop_reason)
        assert (mine.bank, mine.session) == (theirs.bank, theirs.session)


def drawn(seed, **changes):
    return SamplingParams(**{"max_tokens": 40, "temperature": 1.0, "seed": seed, **changes})


def test_answers_that_end_by_themselves(model):
    ahead, ordinary = both(model)
    for turn in range(3):
        asked = [
            request(f"{name}{turn}", prompt(40 + 7 * turn, seed), drawn(seed + turn), session=name)
            for seed, name in enumerate("abcdef")
        ]
        assert_same(run(ahead, *asked), run(ordinary, *asked))
        for name in "abcdef":
            assert_same_banks(banks(ahead, name), banks(ordinary, name))
    assert ahead.stats.steps_ahead > 20
    assert ordinary.stats.steps_ahead == 0
    assert_nothing_held(ahead)


def test_answers_by_working_sets():
    module = tiny("llama")
    model = apply_layout(prepare(module), random_layout(module))
    model = dataclasses.replace(model, eos_token_ids=frozenset({5, 17, 40, 61, 77}))
    ahead, ordinary = both(model)
    for turn in range(3):
        asked = [
            request(f"{name}{turn}", prompt(40 + 7 * turn, seed), drawn(seed + turn), session=name, ce_density=density)
            for seed, (name, density) in enumerate((("a", 0.5), ("b", 0.25), ("c", 1.0), ("d", 0.5)))
        ]
        assert_same(run(ahead, *asked[: 4 - turn]), run(ordinary, *asked[: 4 - turn]))
        for name in "abcd":
            assert_same_banks(banks(ahead, name), banks(ordinary, name))
    assert_same(run(ahead, asked[0]), run(ordinary, asked[0]))  # its end leaves a step ahead that chose nothing
    assert ahead.stats.steps_ahead > 20
    assert_nothing_held(ahead)


def test_most_steps_of_long_answers_are_ahead(model):
    ahead, ordinary = both(model)
    asked = [request(name, prompt(490, seed), LONG, session=name) for seed, name in enumerate("ab")]  # crosses a block
    assert_same(run(ahead, *asked), run(ordinary, *asked))
    assert ahead.stats.steps_ahead >= 36
    assert ahead.stats.steps == ordinary.stats.steps


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_token_ids": frozenset(range(20, 50))},
        {"presence_penalty": 1.0},
        {"logit_bias": ((9, 3.0),)},
        {"logprobs": 2},
        {"ignore_eos": True, "stop_token_ids": frozenset({8})},
        {"top_k": 4},
        {"top_p": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_beside_requests_that_ask_for_more(model, changes):
    ahead, ordinary = both(model)
    asked = [
        request("a", prompt(40, 1), drawn(3, max_tokens=15, **changes)),
        request("b", prompt(60, 2), drawn(4, ignore_eos=True)),
    ]
    found, expected = run(ahead, *asked), run(ordinary, *asked)
    assert_same(found, expected)
    scores = [[event.logprobs for event in events["a"] if isinstance(event, Delta)] for events in (found, expected)]
    assert scores[0] == scores[1]
    assert ahead.stats.steps_ahead > 0


def test_several_choices(model):
    ahead, ordinary = both(model)
    item = request("a", prompt(70, 1), drawn(5), session="s", n=4)
    found, expected = run(ahead, item)["a"], run(ordinary, item)["a"]
    for index in range(4):
        mine, theirs = (
            [event.token_ids for event in events if isinstance(event, Delta) and event.index == index]
            for events in (found, expected)
        )
        assert mine == theirs
    assert_same_banks(banks(ahead, "s"), banks(ordinary, "s"))
    assert_nothing_held(ahead)


def step_until_ahead(engine):
    events = []
    while engine.parts.executor.ahead is None:
        events += engine.step()
    return events


def test_a_request_that_comes_while_a_step_is_under_way(model):
    ahead, ordinary = both(model)
    first, second = request("a", prompt(40, 1), LONG, session="a"), request("b", prompt(300, 2), LONG, session="b")
    ahead.add(first)
    step_until_ahead(ahead)
    ahead.add(second)
    ahead.step()
    assert ahead.parts.executor.ahead is None, "somebody waits"
    assert any(isinstance(event, Admitted) for _, event in ahead.step())
    run_until_idle(ahead)
    run(ordinary, first, second)
    for name in "ab":
        assert_same_banks(banks(ahead, name), banks(ordinary, name))


def test_cancelled_while_its_step_is_under_way(model):
    ahead, ordinary = both(model)
    ahead.add(request("gone", prompt(40, 1), LONG, session="a"))
    ahead.add(request("stays", prompt(50, 2), LONG, session="b"))
    step_until_ahead(ahead)
    assert ahead.abort("gone")
    # its KV blocks and bank row go to the next one at once
    ahead.add(request("next", prompt(80, 3), LONG, session="c"))
    found = run_until_idle(ahead)
    assert "gone" not in found
    run(ordinary, request("stays", prompt(50, 2), LONG, session="b"), request("next", prompt(80, 3), LONG, session="c"))
    for name in "bc":
        assert_same_banks(banks(ahead, name), banks(ordinary, name))
    assert_nothing_held(ahead)


def test_all_cancelled_while_a_step_is_under_way(model):
    ahead, _ = both(model)
    ahead.add(request("a", prompt(40, 1), LONG))
    step_until_ahead(ahead)
    ahead.abort("a")
    assert not ahead.has_work
    found = run(ahead, request("a", prompt(40, 9), LONG))  # the same name, another request
    assert tokens(found["a"]) == tokens(run(new_engine(model), request("a", prompt(40, 9), LONG))["a"])


def test_commits_that_a_directory_takes_note_of(model, tmp_path):
    ahead = use_static_decode(new_engine(model, session_dir=str(tmp_path)))
    ordinary = new_engine(model)
    for turn in range(2):
        asked = [
            request(f"{name}{turn}", prompt(60, seed), drawn(seed), session=name) for seed, name in enumerate("abc")
        ]
        assert_same(run(ahead, *asked), run(ordinary, *asked))
    ahead.close()
    again = new_engine(model, session_dir=str(tmp_path))
    for engine in (again, ordinary):
        engine.prefix_cache.clear()
    asked = [request(name, prompt(61, seed), drawn(seed), session=name) for seed, name in enumerate("abc")]
    found, expected = run(again, *asked), run(ordinary, *asked)
    assert [tokens(found[name]) for name in "abc"] == [tokens(expected[name]) for name in "abc"]


def test_logits_that_are_not_finite_end_their_request_alone(model):
    ahead, ordinary = both(model)
    ahead.add(request("bad", prompt(40, 1), LONG))
    ahead.add(request("good", prompt(50, 2), LONG, session="s"))
    step_until_ahead(ahead)
    forward, calls = ahead.runner.decoder._forward, []

    def broken(buffers, rows, works):
        logits = forward(buffers, rows, works)
        calls.append(len(works))
        place = next((row for row, work in enumerate(works) if work.sequence.id == "bad"), None)
        if place is not None:
            logits[place] = torch.nan
        return logits

    ahead.runner.decoder._forward = broken
    found = run_until_idle(ahead)
    assert isinstance(found["bad"][-1], Failed)
    assert "not finite" in str(found["bad"][-1].error)
    finish(found["good"])
    run(ordinary, request("good", prompt(50, 2), LONG, session="s"))
    assert_same_banks(banks(ahead, "s"), banks(ordinary, "s"))
    assert_nothing_held(ahead)


def test_a_step_ahead_that_fails_is_run_again(model, caplog):
    ahead, ordinary = both(model)
    asked = [request(name, prompt(40, seed), LONG, session=name) for seed, name in enumerate("ab")]
    run_ahead, calls = ahead.runner.run_ahead, []

    def sometimes(step, chosen):
        calls.append(len(step.work))
        if len(calls) == 7:
            run_ahead(step, chosen)  # banks and KV were written
            raise StepFailed("out of memory", None)
        return run_ahead(step, chosen)

    ahead.runner.run_ahead = sometimes
    found, expected = run(ahead, *asked), run(ordinary, *asked)
    assert len(calls) > 7
    assert "a step ahead failed" in caplog.text
    assert ahead.scheduler.preemptions == 2
    for name in "ab":
        assert tokens(found[name]) == tokens(expected[name])
        assert_same_banks(banks(ahead, name), banks(ordinary, name))
    assert_nothing_held(ahead)


def test_a_session_deleted_while_its_step_is_under_way(model):
    ahead, _ = both(model)
    ahead.add(request("a", prompt(40, 1), LONG, session="s"))
    step_until_ahead(ahead)
    done = ahead.call(ahead.ops.delete(("tenant", "s")))
    found = run_until_idle(ahead)
    assert done.result(1)["deleted"]
    assert isinstance(found["a"][-1], Failed)
    assert isinstance(found["a"][-1].error, SessionDeleted)
    assert_nothing_held(ahead)


def test_it_can_be_turned_off(model):
    engine = use_static_decode(new_engine(model, async_scheduling=False))
    run(engine, request("a", prompt(40, 1), LONG))
    assert engine.stats.steps_ahead == 0
