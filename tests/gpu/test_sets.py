"""On a CUDA device: decoded tokens by working sets. ``make test-gpu``."""

import warnings

import pytest
import torch

from pacellm.experts.apply import apply_layout
from pacellm.experts.forward import why_no_kernel
from pacellm.model.load import prepare
from pacellm.types import SamplingParams
from tests.engine.helpers import assert_nothing_held, assert_same_banks, banks, new_engine, prompt, request, run, tokens
from tests.experts.test_layout import random_layout
from tests.models import tiny

pytestmark = pytest.mark.gpu
LONG = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def on_device(**sizes):
    from tests import triton_cases  # Triton is not everywhere that tests are collected

    hidden, weights, table, rows = triton_cases.of_sets(**sizes, dtype=torch.bfloat16)
    moved = type(weights)(*(None if tensor is None else tensor.cuda() for tensor in weights))
    return hidden.cuda(), moved, table.cuda(), rows.cuda()


def with_layout(family="qwen3"):
    module = tiny(family, dtype=torch.bfloat16).cuda()
    return apply_layout(prepare(module), random_layout(module))


@pytest.mark.parametrize("batch", [1, 8, 19])
def test_the_kernel_at_7b_sizes(batch):
    from pacellm.experts import kernel as experts_triton
    from tests.triton_cases import masked_ffn

    inputs = on_device(batch=batch, hidden=3584, size=296, experts=64)
    for activation in ("silu", "gelu", "gelu_tanh"):
        found = experts_triton.products(*inputs, activation)
        for mine, one in zip(found, masked_ffn(*inputs, activation), strict=True):
            assert float((mine.double() - one).abs().max() / one.abs().max()) < 0.01


def test_a_rows_bits_do_not_depend_on_its_mates():
    from pacellm.experts import kernel as experts_triton

    hidden, weights, table, rows = on_device(batch=37, hidden=896, size=76, experts=64)
    expected = experts_triton.products(hidden, weights, table, rows, "silu")
    for seed in range(5):
        order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))[: 1 + 7 * seed].cuda()
        found = experts_triton.products(hidden[order], weights, table, rows[order], "silu")
        for mine, one in zip(found, expected, strict=True):
            assert torch.equal(mine, one[order])


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_graphs_give_the_tokens_of_ordinary_steps(family):
    model = with_layout(family)
    assert why_no_kernel(model.module, model.layout) is None
    densities = (0.5, 0.25, 1.0, 0.75, 0.5)
    asked = [
        request(str(number), prompt(200 + number, number), LONG, session=str(number), ce_density=density)
        for number, density in enumerate(densities)
    ]
    captured, ordinary = new_engine(model), new_engine(model, cuda_graphs=False)
    found = run(captured, *asked)
    assert captured.runner.decoder is not None, "nothing was captured"
    assert any(kind.has_sets for _, kind in captured.runner.decoder._graphs)
    expected = run(ordinary, *asked)
    same = [tokens(found[item.request_id]) == tokens(expected[item.request_id]) for item in asked]
    assert sum(same) >= 3, "bits may differ, for density 1 beside others those of the FFN too, not more"
    assert_nothing_held(captured)


def test_deterministic():
    model = with_layout()
    asked = [
        request(str(number), prompt(300 + 90 * number, number), LONG, session=str(number), ce_density=density)
        for number, density in enumerate((0.5, 1.0, 0.3, 0.5))
    ]
    together = new_engine(model, deterministic=True)
    expected = run(together, *asked)
    for budget in (64, 2048):
        engine = new_engine(model, deterministic=True, max_num_batched_tokens=budget)
        for item in asked:
            found = run(engine, item)
            assert tokens(found[item.request_id]) == tokens(expected[item.request_id])
            assert_same_banks(banks(engine, item.request_id), banks(together, item.request_id))


def test_choosing_sets_waits_for_nothing():
    engine = new_engine(with_layout())
    activity = torch.randint(0, 99, (3, 6)).cuda()
    engine.pool.sets.write_all(0, activity, 0.5)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = engine.pool.sets.write_all(1, activity, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(int(chosen.sum()) == 3 for chosen in found.values())
