"""How much of prompts fits into a step."""

import pytest

from pacellm.engine.chunked_prefill import add_chunks
from pacellm.engine.pace import LONGEST, SEVERAL, SHARE, Pace
from pacellm.engine.sequence import Sequence, Status
from pacellm.engine.step import Step
from pacellm.model.load import prepare
from pacellm.rows import ROWS
from pacellm.sessions.turn import Turn
from tests.engine.helpers import GREEDY, new_engine, request
from tests.engine.machine import DECODE, true_cost
from tests.models import tiny


def experienced():
    """It has seen prompts at several depths."""
    pace = Pace()
    pace.observe(8, [], DECODE)
    for _ in range(40):
        for position, count in ((0, 64), (150_000, 16), (20_000, 48)):
            pace.observe(8, [(position, count)], DECODE + true_cost(position, count))
    pace.observe(8, [], DECODE)
    return pace


def test_without_experience_only_tokens_count():
    pace = Pace()
    assert pace.seconds(decodes=True) is None
    assert pace.seconds(decodes=False) == LONGEST
    assert pace.fitting(0, LONGEST) is None
    pace.observe(0, [(0, 100)], 1.0)
    assert pace.seconds(decodes=True) == 0.0  # nobody knows yet what decoding takes
    assert pace.fitting(0, LONGEST) == 192


def test_parts_are_priced_by_where_they_lie():
    pace = experienced()
    for position, count in ((0, 100), (50_000, 32), (190_000, 16)):
        assert pace.cost(position, count) == pytest.approx(true_cost(position, count), rel=0.1)
    assert pace.fitting(190_000, 0.044) == 0
    assert pace.fitting(0, 0.044) == pytest.approx(216, abs=ROWS)


def test_a_first_experience_deep_in_a_prompt_is_one_of_depth():
    pace = Pace()
    pace.observe(0, [(200_000, 256)], true_cost(200_000, 256))
    assert pace.cost(200_000, 256) == pytest.approx(true_cost(200_000, 256))
    assert pace.cost(0, 256) < 0.2 * true_cost(200_000, 256)


def test_seconds_of_a_step():
    pace = experienced()
    assert pace.seconds(decodes=True) == pytest.approx(SHARE * DECODE)
    assert pace.seconds(decodes=False) == LONGEST
    assert pace.seconds(decodes=False, several=True) == SEVERAL


def test_a_step_faster_than_decoding_alone_costs_nothing():
    pace = Pace()
    pace.observe(1, [], 0.5)
    pace.observe(1, [(0, 64)], 0.1)
    assert pace.fitting(0, pace.seconds(decodes=True)) is None


def test_what_decoding_takes_is_looked_at_again():
    pace = Pace()
    pace.observe(1, [], 0.010)
    seconds = []
    for _ in range(200):
        seconds.append(pace.seconds(decodes=True))
        parts = [(0, 64)] if seconds[-1] else []
        pace.observe(32, parts, 0.040 + 64e-4 * len(parts))  # by now decoding takes four times as long
    assert seconds.count(0.0) == 3
    assert pace.decode == 0.040


class Streams:
    """A scheduler beside decoding streams, with sequences that are all prompt, on the true costs."""

    def __init__(self, num_decodes=8):
        engine = new_engine(prepare(tiny("llama")), max_num_batched_tokens=2048, max_num_mixed_tokens=256)
        self.scheduler, self.num_decodes = engine.scheduler, num_decodes
        self.pace = self.scheduler.pace = experienced()
        self.step_seconds = []

    def prompt(self, name, position, tokens):
        sequence = Sequence(request(name, [5], GREEDY), [5], 1, 0, status=Status.RUNNING)
        sequence.begin([Turn(position, position + tokens, range(tokens), "on")], 0.0)
        self.scheduler.running.append(sequence)
        return sequence

    def step(self):
        step = Step([None] * self.num_decodes)
        several = len(self.scheduler.running) > 1
        seconds = self.pace.seconds(decodes=True, several=several)
        add_chunks(step, self.scheduler.running, 256, seconds, self.pace, lambda sequence: False)
        work = step.work[self.num_decodes :]
        parts = [(item.position, item.count) for item in work]
        self.step_seconds.append(DECODE + sum(true_cost(*part) for part in parts))
        self.pace.observe(self.num_decodes, parts, self.step_seconds[-1])
        for item in work:
            item.sequence.cursor += item.count
            item.sequence.done_work += item.count
            if not item.sequence.pending:
                self.scheduler.running.remove(item.sequence)


def test_a_step_that_is_to_show_what_decoding_takes_has_no_prompts():
    streams = Streams()
    streams.prompt("short", 0, 4000)
    streams.prompt("long", 190_000, 10_000)
    streams.pace.save(10.0)
    for _ in range(65):
        streams.step()
    assert DECODE in streams.step_seconds[-2:]


def test_streams_keep_their_pace_deep_in_a_prompt():
    streams = Streams()
    long = streams.prompt("long", 190_000, 10_000)
    for _ in range(600):
        streams.step()
    mean = sum(streams.step_seconds) / 600 / DECODE
    assert 2.5 < mean <= 1 + SHARE + 0.05
    assert max(streams.step_seconds) <= DECODE + 1.01 * true_cost(200_000, ROWS)  # no gap longer than a smallest part
    assert long.cursor > 3000


def test_short_prompts_neither_wait_for_a_long_one_nor_starve_it():
    streams = Streams()
    long = streams.prompt("long", 150_000, 50_000)
    waits = []
    for number in range(600):
        if number % 2 == 0:
            waits.append((number, streams.prompt(f"short {number}", 0, 20)))
        streams.step()
        waits = [(since, short) for since, short in waits if short.pending or number - since > 2]
        assert all(number - since <= 2 for since, _ in waits), "a short prompt takes a step or two"
    assert sum(streams.step_seconds) / 600 / DECODE <= 1 + SHARE + 0.1
    alone = 600 * SHARE * DECODE / true_cost(150_000, 1)
    assert long.cursor > 0.75 * alone, "short prompts are charged what they cost, not what a deep part does"


def test_what_is_out_of_sight_costs_nothing():
    """Where a token sees at most so many, a long history's tokens cost alike."""
    near, far = Pace(), Pace(1000)
    for pace in (near, far):
        for position in (0, 400, 0, 800, 200):
            pace.observe(0, [(position, 100)], 0.1 + position / 1000)
    assert far.cost(0, 800) == near.cost(0, 800)
    assert far.cost(200_000, 10) == pytest.approx(far.cost(1000, 10))
    assert far.cost(0, 2000) == pytest.approx(far.cost(0, 1000) + far.cost(1000, 1000))
    assert near.cost(200_000, 10) > near.cost(1000, 10)
