"""On a CUDA device: every attention kernel that is there beside plain attention, and the choice. ``make test-gpu``."""

import pytest
import torch

from pacellm.errors import ConfigError
from pacellm.model.attention import choice as kernel_choice
from pacellm.model.attention import prefill as prefill_kernels
from pacellm.model.load import prepare
from tests.engine.helpers import new_engine, prompt, request, run, tokens
from tests.model.cuda_steps import check
from tests.models import tiny

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def kernel_of(name):
    try:
        return prefill_kernels.load(name)
    except Exception as problem:
        pytest.skip(kernel_choice.reason(problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(28, ((4, 128), (4, 128))), (8, ((8, 64), (8, 64)))])
@pytest.mark.parametrize("name", kernel_choice.NAMES)
def test_a_kernel_is_right(name, shape, dtype):
    assert kernel_choice.error(kernel_of(name), shape, dtype, CUDA) <= kernel_choice.TOLERANCE


@pytest.mark.parametrize("name", kernel_choice.NAMES)
def test_a_step_by_each_kernel(name, monkeypatch):
    monkeypatch.setattr(prefill_kernels, "CUDNN_STEP", 256)  # so that the step has a chunk for it
    check(torch.bfloat16, "cuda", (None, 100), 2e-2, size=64, kernel=kernel_of(name))


def test_the_choice_is_one_that_was_timed():
    shapes = [(28, ((4, 128), (4, 128)))] * 28
    trial = kernel_choice.choose("auto", shapes, torch.bfloat16, CUDA)
    assert trial.seconds[trial.kernel.name] == min(trial.seconds.values())
    assert "flash" in trial.seconds
    assert "cudnn" in trial.seconds, trial.refused["cudnn"]


@pytest.mark.parametrize("name", kernel_choice.NAMES)
def test_an_engine_with_each_kernel_gives_the_tokens_of_flash(name):
    model = prepare(tiny("qwen3", dtype=torch.bfloat16).cuda())
    asked = [request(str(number), prompt(1000 + 400 * number, number)) for number in range(5)]
    expected = run(new_engine(model, attention_kernel="flash"), *asked)
    try:
        engine = new_engine(model, attention_kernel=name)
    except ConfigError as refused:  # not installed, or not for heads as small as these
        pytest.skip(refused.message)
    found = run(engine, *asked)
    same = [tokens(found[item.request_id]) == tokens(expected[item.request_id]) for item in asked]
    assert sum(same) >= 4, "bits may differ between kernels, not more"
