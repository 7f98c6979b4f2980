"""On a CUDA device: decode steps as graphs, banks in Triton, deterministic products. ``make test-gpu``."""

import dataclasses

import pytest
import torch

from pacellm.config import PRESETS
from pacellm.memory import decode_device
from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.load import prepare
from pacellm.types import SamplingParams
from tests.engine.helpers import assert_nothing_held, assert_same_banks, banks, new_engine, prompt, request, run, tokens
from tests.memory.test_decode_device import assert_same_rows, config, new_pool, told, turns
from tests.models import tiny

pytestmark = pytest.mark.gpu


def test_the_decode_kernel_is_right():
    found = attention_cuda.no_decode_kernel([((4, 128), (4, 128))], torch.bfloat16, torch.device("cuda"))
    assert found is None


@pytest.mark.parametrize("preset", PRESETS)
def test_banks_in_triton(preset):
    from pacellm.memory import decode_triton  # Triton is not everywhere that tests are collected

    settings = config(preset=preset)
    mine, theirs = new_pool(settings, device="cuda").arena[0], new_pool(settings, device="cuda").arena[0]
    for rows, writes, x, y in turns(40):
        tokens_ = told(rows.cuda(), writes.cuda(), preset)
        expected = decode_device.feed(theirs, tokens_, x.cuda(), y.cuda(), settings)
        found = decode_triton.feed(mine, tokens_, x.cuda(), y.cuda(), settings)
        if settings.acts:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert_same_rows(mine, theirs, close={"rtol": 1e-3, "atol": 1e-3})


def test_graphs_give_the_tokens_of_ordinary_steps():
    model = prepare(tiny("qwen3", dtype=torch.bfloat16).cuda())
    asked = [request(str(number), prompt(200 + number, number), session=str(number)) for number in range(5)]
    captured, ordinary = new_engine(model), new_engine(model, cuda_graphs=False)
    found = run(captured, *asked)
    assert captured.runner.decoder is not None, "nothing was captured"
    expected = run(ordinary, *asked)
    same = [tokens(found[item.request_id]) == tokens(expected[item.request_id]) for item in asked]
    assert sum(same) >= 4, "bits may differ between batches, not more"
    assert_nothing_held(captured)


def test_steps_ahead_give_the_tokens_of_steps_that_wait():
    model = dataclasses.replace(
        prepare(tiny("qwen3", dtype=torch.bfloat16).cuda()), eos_token_ids=frozenset({5, 17, 40})
    )
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=1)  # each ends by itself, sooner or later
    ahead, waits = new_engine(model), new_engine(model, async_scheduling=False)
    for number in range(8):
        item = request(str(number), prompt(200 + number, number), sampling, session=str(number))
        assert tokens(run(ahead, item)[item.request_id]) == tokens(run(waits, item)[item.request_id])
        assert_same_banks(banks(ahead, str(number)), banks(waits, str(number)))
    together = [request(f"t{number}", prompt(90 + number, number), sampling) for number in range(6)]
    found, expected = run(ahead, *together), run(waits, *together)
    same = [tokens(found[item.request_id]) == tokens(expected[item.request_id]) for item in together]
    assert sum(same) >= 4, "bits may differ between batches, not more"
    assert ahead.stats.steps_ahead > 20
    assert waits.stats.steps_ahead == 0
    assert_nothing_held(ahead)


def test_deterministic():
    model = prepare(tiny("qwen3", dtype=torch.bfloat16).cuda())
    asked = [request(str(number), prompt(300 + 90 * number, number), session=str(number)) for number in range(4)]
    whole = new_engine(model, deterministic=True)
    expected = run(whole, *asked)
    for budget in (64, 333):
        engine = new_engine(model, deterministic=True, max_num_batched_tokens=budget)
        for item in asked:
            found = run(engine, item)
            assert tokens(found[item.request_id]) == tokens(expected[item.request_id])
            assert_same_banks(banks(engine, item.request_id), banks(whole, item.request_id))
