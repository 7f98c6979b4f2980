"""More work than the machine can do: what ends in time. On a simulated machine, so every number is exact."""

import collections

import pytest

from pacellm.engine.pace import LONGEST
from pacellm.errors import DeadlineExceeded, Overloaded
from tests.engine.machine import Asked, Machine, poisson, true_cost

SECONDS = 60


def usual(at, rng):
    """A prompt and an answer of a common size, and ten seconds for both."""
    return Asked(at, rng.randint(500, 3500), rng.randint(8, 64), 10.0)


def alike(at, rng=None):
    return Asked(at, 2000, 32, 10.0)


def capacity(make):
    """Answers a second where nobody has a deadline and there is always more to do."""
    machine = Machine()
    requests = poisson(100.0, 1.0, make)
    for one in requests:
        one.timeout = None
    machine.run(requests)
    return len(requests) / machine.now


def good(outcomes):
    return [one for one in outcomes if one.is_good]


def errors(outcomes):
    return collections.Counter(type(one.error) for one in outcomes if not one.is_good)


@pytest.mark.parametrize("make", [usual, alike])
@pytest.mark.parametrize("load", [1.5, 3, 10])
def test_goodput_under_overload(make, load):
    most = capacity(make)
    machine = Machine()
    outcomes = machine.run(poisson(load * most, SECONDS, make))
    assert len(good(outcomes)) >= 0.8 * most * SECONDS
    assert all(one.ended - one.asked.at <= 10.0 for one in good(outcomes))
    refused = [one for one in outcomes if isinstance(one.error, Overloaded)]
    assert all(one.ended - one.asked.at <= 1.05 * LONGEST for one in refused), "refused after the step that ran"
    assert all(1 <= one.error.retry_after <= 60 for one in refused)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_what_can_be_done_is_not_refused(load):
    machine = Machine()
    outcomes = machine.run(poisson(load * capacity(usual), SECONDS, usual))
    assert len(good(outcomes)) == len(outcomes)


def test_a_burst_before_anything_is_known():
    """Many at once, with a deadline that a third of them can make."""
    most = capacity(alike)
    outcomes = Machine().run([Asked(0.0, 2000, 32, 60.0) for _ in range(200)])
    assert len(good(outcomes)) >= 0.9 * 60 * most
    assert set(errors(outcomes)) == {DeadlineExceeded}


def test_equal_prompts_end_one_after_another():
    machine = Machine()
    ended = [one.ended for one in machine.run([Asked(0.0, 3000, 1) for _ in range(12)])]
    each = true_cost(0, 3000)
    for number, moment in enumerate(ended, start=1):
        assert moment == pytest.approx(number * each, abs=1.1 * each)


def test_the_first_that_came_ends_first_within_a_priority():
    urgent, usual, late = ([Asked(at, 2000, 1, priority=priority) for at in (0.0, 0.1, 0.2)] for priority in (-1, 0, 1))
    outcomes = Machine().run([Asked(0.0, 2000, 1, priority=-9), *late, *usual, *urgent])
    order = [(one.asked.priority, one.asked.at) for one in outcomes]
    assert order == sorted(order)


def test_short_prompts_and_a_long_one_do_not_starve_each_other():
    short = [Asked(1 + 0.5 * number, 200, 8, 5.0) for number in range(200)]
    outcomes = Machine().run([Asked(0.0, 100_000, 4, 300.0), *short])
    assert not errors(outcomes)
    waits = sorted(one.ended - one.asked.at for one in outcomes)
    assert waits[-2] < 3.0
    assert waits[-1] < 1.3 * true_cost(0, 100_000)


def test_what_cannot_be_done_takes_nothing_from_what_can():
    """A prompt that would take longer than its deadline allows, before any number of others that would not."""
    short = [Asked(0.4 * number, 1000, 8, 5.0) for number in range(30)]
    outcomes = Machine().run([Asked(0.0, 2000, 8, 5.0), Asked(1.05, 60_000, 8, 15.0), *short])
    assert [one.asked.prompt for one in outcomes if not one.is_good] == [60_000]


def test_a_request_without_a_deadline_is_always_answered():
    requests = poisson(5.0, 20.0, usual)
    for one in requests[::5]:
        one.timeout = None
    outcomes = Machine().run(requests)
    assert all(one.is_good for one in outcomes if one.asked.timeout is None)
