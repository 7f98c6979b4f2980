"""How many prompt tokens fit into a step."""

from pacellm.engine.pace import LONGEST, SEVERAL, SHARE, Pace
from pacellm.rows import ROWS


def test_without_experience_the_limit_holds():
    pace = Pace()
    assert pace.budget(2048, decodes=False) == 2048
    assert pace.budget(256, decodes=True) == 256
    pace.observe(0, 100, 1.0)
    assert pace.budget(256, decodes=True) == 0  # nobody knows yet what decoding takes


def test_prompt_parts_take_a_multiple_of_the_decoding_beside_them():
    pace = Pace()
    pace.observe(8, 0, 0.010)
    pace.observe(8, 100, 0.110)  # a millisecond a token
    assert pace.budget(256, decodes=True) == ROWS  # 17 tokens of time, whole rows
    for _ in range(50):
        pace.observe(8, 100, 0.020)
    assert pace.budget(256, decodes=True) == int(SHARE * 0.010 / 1e-4) // ROWS * ROWS
    pace.observe(8, 0, 0.010)
    for _ in range(50):
        pace.observe(8, 100, 0.011)
    assert pace.budget(256, decodes=True) == 256


def test_a_step_that_decodes_nothing_is_bounded_too():
    pace = Pace()
    pace.observe(0, 2048, 8.192)
    assert pace.budget(2048, decodes=False) == int(LONGEST / 0.004) // ROWS * ROWS
    assert pace.budget(2048, decodes=False, several=True) == int(SEVERAL / 0.004) // ROWS * ROWS
    pace.observe(0, 16, 1000.0)
    assert pace.budget(2048, decodes=False) == ROWS


def test_a_step_faster_than_decoding_alone_costs_nothing():
    pace = Pace()
    pace.observe(1, 0, 0.5)
    pace.observe(1, 64, 0.1)
    assert pace.budget(256, decodes=True) == 256


def test_what_decoding_takes_is_looked_at_again():
    pace = Pace()
    pace.observe(1, 0, 0.010)
    budgets = []
    for _ in range(200):
        budget = pace.budget(256, decodes=True)
        budgets.append(budget)
        pace.observe(32, budget, 0.040 + budget * 1e-4)  # by now decoding takes four times as long
    assert budgets.count(0) == 3
    assert budgets[-1] == 256
    assert pace.decode == 0.040


def test_deep_in_a_prompt_the_smallest_part_waits_for_its_time():
    pace = Pace()
    pace.observe(1, 0, 0.005)
    pace.observe(1, ROWS, 0.005 + ROWS * 0.004)  # a part takes 64 ms, thirteen times the decoding
    budgets, seconds = [], []
    for _ in range(400):
        budget = pace.budget(256, decodes=True)
        budgets.append(budget)
        seconds.append(0.005 + budget * 0.004)
        pace.observe(1, budget, seconds[-1])
    assert set(budgets) == {0, ROWS}  # nothing larger, so no gap is longer than one smallest part
    mean = sum(seconds) / len(seconds) / 0.005
    assert 2.5 < mean <= 1 + SHARE
