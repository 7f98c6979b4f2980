"""Decode steps on static buffers: the same bits as ordinary steps. Capture itself needs a GPU (tests/gpu)."""

import pytest

from pacellm.engine.pace import Pace
from pacellm.experts.apply import apply_layout
from pacellm.model.load import prepare
from pacellm.run import graphs
from pacellm.run.graphs import Group, shared_groups
from pacellm.types import SamplingParams
from tests.engine.helpers import (
    GREEDY,
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

LONG = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


def static_engine(model, **changes):
    return use_static_decode(new_engine(model, max_num_seqs=20, **changes))


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3"])
def test_a_static_step_equals_an_ordinary_one_to_the_bit(family):
    model = prepare(tiny(family))
    asked = [
        request("a", prompt(37, 1), LONG, session="a"),
        request("b", prompt(511, 2), LONG, session="b"),  # crosses a block while it decodes
        request("c", prompt(90, 3), LONG, session="c", pa="off"),
        request("d", prompt(80, 4), GREEDY, session="d", pa="read_only"),  # ends first
    ]
    ordinary, static = new_engine(model, max_num_seqs=20), None
    expected = run(ordinary, *asked)
    static = static_engine(model)
    seen = []
    forward = static.runner._forward_decoded
    static.runner.decoder._forward = lambda buffers, rows, sequences: (
        seen.append(len(sequences)),
        forward(buffers, rows, sequences),
    )[1]
    found = run(static, *asked)
    assert max(seen) == 4
    assert len(seen) >= 29
    for name in "abcd":
        assert tokens(found[name]) == tokens(expected[name]), name
        assert_same_banks(banks(static, name), banks(ordinary, name))
    assert finish(found["a"]).bank == finish(expected["a"]).bank
    assert_nothing_held(static)


@pytest.mark.parametrize("changes", [{}, {"pa": False}, {"deterministic": True}])
def test_working_sets_by_row_of_the_table_are_the_same_bits(changes):
    module = tiny("llama")
    model = apply_layout(prepare(module), random_layout(module))
    asked = [
        request("a", prompt(37, 1), LONG, session="a", ce_density=0.5),
        request("b", prompt(511, 2), LONG, session="b", ce_density=0.3, pa="off"),
        request("c", prompt(90, 3), LONG, session="c"),
        request("d", prompt(80, 4), GREEDY, session="d", ce_density=0.8, pa="read_only"),  # ends first
    ]
    again = request("again", [*prompt(37, 1), *prompt(20, 9)], LONG, session="a", ce_density=0.2)
    ordinary, kinds = new_engine(model, max_num_seqs=20, **changes), set()
    expected = run(ordinary, *asked) | run(ordinary, again)
    static = static_engine(model, **changes)
    forward = static.runner._forward_decoded
    static.runner.decoder._forward = lambda buffers, rows, sequences: (
        kinds.add((len(sequences), rows.tokens.sets is not None)),
        forward(buffers, rows, sequences),
    )[1]
    found = run(static, *asked) | run(static, again)
    assert (4, True) in kinds
    dense = run(static, request("dense", prompt(40, 5), GREEDY))["dense"]
    assert (1, False) in kinds
    assert tokens(dense) == tokens(run(ordinary, request("dense", prompt(40, 5), GREEDY))["dense"])
    for name in found:
        assert tokens(found[name]) == tokens(expected[name]), name
    for name in "abcd":
        assert_same_banks(banks(static, name), banks(ordinary, name))
    assert_nothing_held(static)


def test_only_decode_steps_fit():
    engine = static_engine(prepare(tiny("llama")), max_num_batched_tokens=64)
    engine.add(request("a", prompt(30, 1), LONG))
    engine.step()
    engine.add(request("b", prompt(300, 2), LONG))
    engine.scheduler.pace = Pace()  # as if no prompt had been timed: the prompt need not wait
    step = engine.scheduler.schedule()
    assert len(step.work) == 2
    assert not graphs.fits(step)


def test_shared_beginnings_are_found():
    tables = [[5, 6, 7, 8], [1, 2], [5, 6, 7, 9], [5, 6, 3], [1, 2]]
    lengths = [1700, 600, 1800, 1100, 800]
    assert shared_groups(tables, lengths, least=512) == [Group((0, 2, 3), 2), Group((1, 4), 1)]
    assert shared_groups(tables, lengths, least=1024) == [Group((0, 2, 3), 2)]
    many = shared_groups([[1, 2, 3]] * 20, [1300] * 20, least=1024)
    assert [len(group.rows) for group in many] == [16, 4]
    assert shared_groups([[1]] * 3, [512] * 3, least=512) == [], "the last token's block is nobody else's"


def test_groups_reach_the_buffers():
    class Table:
        blocks = (3, 4, 9)

    class Fake:
        table, position, place, cursor, row, ends = Table, 1400, 1400, 0, None, None

        class turn:
            ids, pa = (7,), "on"

    import torch

    Fake.sequence = Fake
    buffers = graphs.Buffers(16, 5, torch.device("cpu"), dump=99, scratch_row=5)
    assert not graphs._groups([Fake])
    monkey = graphs._LEAST_SHARED
    assert monkey == 2048
    tables = [Fake] * 3
    Table.blocks = (3, 4, 5, 6, 9)
    Fake.position = Fake.place = 2300
    buffers.fill(tables, graphs._groups(tables))
    rows = buffers.sharing
    assert rows.shared.lengths.tolist()[:3] == [0, 2048, 0]
    assert rows.shared.members[1].tolist()[:4] == [0, 1, 2, -1]
    assert rows.shared.members[0].tolist() == [-1] * 16
    assert rows.shared.group.tolist()[:5] == [1, 1, 1, 0, 0]
    assert rows.tables[0].tolist()[:4] == [3 * 512, 4 * 512, 5 * 512, 6 * 512]
    assert rows.slots.tolist()[:4] == [9 * 512 + 2300 % 512] * 3 + [99]
    assert rows.lengths.tolist()[:4] == [2301, 2301, 2301, 1]
    assert rows.tokens.rows.tolist() == [5] * 16
    assert not rows.tokens.live.any()
