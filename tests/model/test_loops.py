"""Activations whose bits do not depend on how many numbers there are, with any number of threads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from pacellm.model.loops import evenly, make_even

FUNCTIONS = [F.silu, torch.sigmoid, lambda x: F.gelu(x, approximate="tanh")]


@pytest.fixture(params=[1, 2, 3, 5, 7, 16])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("function", FUNCTIONS, ids=["silu", "sigmoid", "gelu_tanh"])
@pytest.mark.parametrize("width", [576, 1536, 4864])
def test_rows_keep_their_bits(function, width, threads):
    x = torch.randn(1024, width, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    whole = function(x)
    torch.set_num_threads(threads)
    for rows in (4, 16, 20, 28, 88, 96, 148, 300, 500, 700, 1000, 1024):
        assert torch.equal(evenly(function, x[None, :rows]), whole[None, :rows]), rows


def test_activations_of_a_model_are_found():
    model = nn.ModuleList([ACT2FN["silu"], ACT2FN["gelu_pytorch_tanh"], nn.SiLU(), nn.Linear(2, 2)])
    before = [part.forward for part in model]
    make_even(model)
    after = [part.forward for part in model]
    make_even(model)
    assert [part.forward for part in model] == after
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, False, True]
    x = torch.randn(4, 16)
    assert torch.equal(model[0](x), F.silu(x))
