"""Linear layers on a CPU: the kernel with the fewest rows that is exact, measured and not believed."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pacellm.model import linear as products
from pacellm.model.linear import OneDNN, choose, give_back
from pacellm.rows import ROWS

PLENTY = 2**40
SMOLLM2 = [(576, 576), (576, 192), (576, 1536), (1536, 576)]


class Moody(nn.Linear):
    """Gives other bits to large batches."""

    def forward(self, rows):
        return super().forward(rows) * (1 + 1e-6 * (len(rows) > 100))


class Choosy(nn.Linear):
    """Gives other bits to rows whose number is no multiple of 8."""

    def forward(self, rows):
        return super().forward(rows) * (1 + 1e-6 * (len(rows) % 8 > 0))


def layers(*sizes, **more):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(*size, **more) for size in sizes).requires_grad_(False)


def test_sizes_that_differ_are_named():
    model = nn.Sequential(nn.Linear(64, 32), Moody(32, 16), Moody(16, 16))
    found = choose(model, PLENTY)
    assert found.inexact == ((16, 16), (32, 16))
    assert found.rows == ROWS
    assert not found.is_exact


def test_the_layer_that_wants_most_rows_decides():
    assert choose(nn.Sequential(Choosy(64, 32), nn.Linear(32, 64)), PLENTY).rows >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_a_real_model(dtype):
    """With ``rows`` of any multiple every row has the bits that it has among 700."""
    model = layers(*SMOLLM2).to(dtype)
    found = choose(model, PLENTY)
    assert found.is_exact
    for layer in model:
        hidden = torch.randn(700, layer.in_features).to(dtype)
        with torch.inference_mode():
            many = layer(hidden)
            for count in range(found.rows, 10 * found.rows + 1, found.rows):
                assert torch.equal(layer(hidden[:count]), many[:count]), (layer, count)


@pytest.mark.parametrize("bias", [True, False])
def test_packed_or_not_is_the_same(bias):
    packed, plain = layers(*SMOLLM2, bias=bias), layers(*SMOLLM2, bias=bias)
    found, other = choose(packed, PLENTY), choose(plain, 0)
    assert other.packed == 0
    assert found.rows == other.rows
    if found.kernel == "onednn":
        assert found.packed == sum(layer.weight.nbytes for layer in packed)
    for one, two in zip(packed, plain, strict=True):
        hidden = torch.randn(1, 20, one.in_features)
        assert torch.equal(one(hidden), two(hidden))
        torch.testing.assert_close(one(hidden), nn.functional.linear(hidden, one.weight, one.bias))
        assert one(hidden[:, :0]).shape == (1, 0, one.out_features)


def test_weights_that_change_are_packed_anew():
    layer = layers((64, 32))[0]
    form, hidden = OneDNN(layer, packs=True), torch.randn(4, 64)
    form(hidden)
    layer.weight.copy_(layer.weight.flip(0).clone())
    torch.testing.assert_close(form(hidden), nn.functional.linear(hidden, layer.weight, layer.bias))
    layer.weight.data = torch.randn(32, 64)
    torch.testing.assert_close(form(hidden), nn.functional.linear(hidden, layer.weight, layer.bias))


def test_measured_once_and_given_back():
    model = layers((64, 32))
    assert choose(model, PLENTY) is choose(model, PLENTY)
    give_back(model)
    assert "forward" not in model[0].__dict__


def test_without_onednn_torch_does_the_work(monkeypatch):
    def missing():
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_product", missing)
    model = layers((64, 32))
    assert choose(model, PLENTY).kernel == "torch"
    assert "forward" not in model[0].__dict__


def test_weights_that_onednn_does_not_take():
    assert choose(layers((64, 32)).double(), PLENTY).kernel == "torch"


@pytest.mark.parametrize(
    "other",
    [nn.ParameterList([torch.zeros(2, 3, 4)]), nn.Linear(20, 16), Moody(64, 8)],
    ids=["routed experts", "a width with a remainder", "a layer of another kind"],
)
def test_other_products_want_all_rows(other):
    model = nn.ModuleList([nn.Linear(64, 32), other]).requires_grad_(False)
    assert choose(model, PLENTY).rows == ROWS


MEMORY_OF_MANY_STEPS = """
import ctypes
import torch
from torch import nn
from pacellm.model.linear import OneDNN, choose

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
model = nn.ModuleList(nn.Linear(64, size) for size in (32, 64, 128)).requires_grad_(False)
choose(model, 2**40)
layers = [OneDNN(layer, packs=True) for layer in model]
hidden = torch.zeros(400, 64)
with torch.inference_mode():
    for count in range(1, 401):
        for layer in layers:
            layer(hidden[:count])
        if count in (100, 400):
            print(mallinfo().uordblks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc tells what is allocated")
def test_numbers_of_rows_do_not_fill_memory():
    """Steps of all sizes, in a process that has had no product before."""
    inherited = {name: value for name, value in os.environ.items() if name not in products._CAPACITIES}
    command = [sys.executable, "-c", MEMORY_OF_MANY_STEPS]
    done = subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=120, check=True)
    early, late = map(int, done.stdout.split())
    assert late - early < 16 * 2**20


def test_the_environment_says_how_many_products_are_kept(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    choose(layers((64, 32)), PLENTY)
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
