"""Triton kernels beside what they stand for; tests/test_triton.py runs this file under Triton's interpreter."""

import pytest
import torch
from torch.nn.functional import linear

from pacellm.config import PRESETS
from pacellm.experts import kernel as experts_triton
from pacellm.experts.forward import ExpertForward
from pacellm.experts.gated import ACTIVATIONS, Weights, activation_name
from pacellm.memory import decode_device, decode_triton
from pacellm.memory.tokens import DecodedTokens
from pacellm.model import fused, fused_triton
from pacellm.model.attention import decode as attention_decode
from pacellm.model.attention import prefill as prefill_kernels
from pacellm.model.context import DecodeRows, Shared
from pacellm.model.neurons import ffns
from tests.experts.test_layout import random_layout
from tests.memory.algorithm1 import Algorithm1
from tests.memory.test_bank import data
from tests.memory.test_decode_device import ROWS, assert_same_rows, config, new_pool, new_sets, told, turns
from tests.memory.test_working_set import logprobs_by_kernel
from tests.models import tiny


@pytest.mark.parametrize(("preset", "ties"), [("reference", "index"), ("paper", "age"), ("observe", "index")])
def test_feed(preset, ties):
    """Some steps in torch fill the banks; then steps of all rows, side by side."""
    settings = config(preset=preset, ties=ties, bank_size=10, top_k=3)
    mine, theirs = new_pool(settings).arena[0], new_pool(settings).arena[0]
    for number, (rows, writes, x, y) in enumerate(turns(30)):
        tokens = told(rows, writes, preset)
        if number in (17, 29):
            tokens.live[0] = False
            before = mine.counters[:ROWS].sum(0)
            expected = decode_device.feed(theirs, tokens, x, y, settings)
            found = decode_triton.feed(mine, tokens, x, y, settings)
            if settings.acts:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (mine.counters[:ROWS].sum(0) > before).any()
        else:
            for arena in (mine, theirs):
                decode_device.feed(arena, tokens, x, y, settings)
    assert_same_rows(mine, theirs, close={"rtol": 1e-4, "atol": 1e-4})
    assert mine.counters[:ROWS].sum(0).gt(0).sum() >= 5


@pytest.mark.parametrize("preset", PRESETS)
def test_feed_is_algorithm_1(preset):
    """Two sequences, their tokens segments of one."""
    settings = config(preset=preset, ties="age", bank_size=8, top_k=3)
    arena, rules = new_pool(settings).arena[0], [Algorithm1(settings) for _ in range(2)]
    rows = torch.arange(2)
    tokens = told(rows, rows >= 0, preset)
    x, y = data(60, 48, 16, seed=1)
    for at in range(0, 60, 2):
        pair = x[at : at + 2], y[at : at + 2]
        found = decode_triton.feed(arena, tokens, *pair, settings)
        expected = torch.cat([rule.segment(*(part[row : row + 1] for part in pair)) for row, rule in enumerate(rules)])
        if settings.acts:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for row, rule in enumerate(rules):
        rule.assert_holds(type(arena)(*(tensor[row] for tensor in arena)), rtol=1e-4, atol=1e-4)
        assert rule.counts[4]
        assert rule.counts[5]


def test_feed_with_working_sets():
    """Banks of whole activations, then tokens of sets: what lies outside of a token's set does not count."""
    settings = config(bank_size=10, top_k=3)
    mine, theirs, table = new_pool(settings).arena[0], new_pool(settings).arena[0], new_sets()
    for number, (rows, writes, x, y) in enumerate(turns(30)):
        tokens = told(rows, writes, "reference", rows)
        if number < 27:
            for arena in (mine, theirs):
                decode_device.feed(arena, tokens, x, y, settings)
        else:
            x = x * table[rows].repeat_interleave(x.shape[1] // table.shape[1], 1)
            expected = decode_device.feed(theirs, tokens, x, y, settings, table)
            found = decode_triton.feed(mine, tokens, x, y, settings, table)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_same_rows(mine, theirs, close={"rtol": 1e-4, "atol": 1e-4})
    assert mine.counters[:ROWS].sum(0).gt(0).sum() >= 4


def test_tokens_of_all_presets_side_by_side():
    settings = config(bank_size=10, top_k=3)
    mine, theirs = new_pool(settings).arena[0], new_pool(settings).arena[0]
    for number, (rows, writes, x, y) in enumerate(turns(36)):
        presets = rows % len(PRESETS)
        tokens = DecodedTokens(rows, torch.ones_like(writes), writes, presets)
        expected = decode_device.feed(theirs, tokens, x, y, settings)
        if number in (29, 35):
            found = decode_triton.feed(mine, tokens, x, y, settings)
            torch.testing.assert_close(found[tokens.acts], expected[tokens.acts], rtol=1e-4, atol=1e-4)
        else:
            decode_device.feed(mine, tokens, x, y, settings)
    assert_same_rows(mine, theirs, close={"rtol": 1e-4, "atol": 1e-4})


def decode_rows(lengths, tables, shared=None):
    """A decode step's rows, without banks."""
    nobody = torch.zeros(len(lengths), dtype=torch.int64)
    tokens = DecodedTokens(nobody, nobody > 0, nobody > 0, nobody)
    slots = torch.zeros(len(lengths), dtype=torch.int64)
    return DecodeRows(slots, torch.tensor(lengths, dtype=torch.int32), tables, tokens, shared)


def plain(query, keys, values, table, first, length, scale):
    """One sequence's attention in float64: [H, D]."""
    slots = torch.tensor([int(table[p // 512]) + p % 512 for p in range(first, length)])
    group = query.shape[0] // keys.shape[0]
    own_keys, own_values = (slab[:, slots].double().repeat_interleave(group, 0) for slab in (keys, values))
    scores = (query[:, None].double() @ own_keys.transpose(1, 2)) * scale
    return (scores.softmax(-1) @ own_values)[:, 0]


@pytest.mark.parametrize("window", [None, 100])
def test_decode_attention(window):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 3, 24, generator=generator)
    keys, values = (torch.randn(2, 4 * 512, 24, generator=generator) for _ in range(2))
    tables = torch.tensor([[512, 0], [1536, 0], [1024, 512]], dtype=torch.int32)
    lengths = [130, 1, 700]
    found = attention_decode.decode_attention(query, keys, values, decode_rows(lengths, tables), 0.3, window, splits=3)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        expected = plain(query[:, row], keys, values, tables[row], first, length, 0.3)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_beginning_is_read_once():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 4, 16, generator=generator)
    keys, values = (torch.randn(2, 5 * 512, 16, generator=generator) for _ in range(2))
    tables = torch.tensor([[512, 0], [1536, 0], [512, 1024], [512, 2048]], dtype=torch.int32)
    lengths = [600, 90, 530, 513]  # 0, 2 and 3 share their first block
    shared = Shared(
        members=torch.tensor([[-1, -1, -1], [0, 2, 3]], dtype=torch.int32),
        leader=torch.tensor([0, 2], dtype=torch.int32),
        lengths=torch.tensor([0, 512], dtype=torch.int32),
        group=torch.tensor([1, 0, 1, 1]),
    )
    found = attention_decode.decode_attention(
        query, keys, values, decode_rows(lengths, tables, shared), 0.3, None, splits=2
    )
    for row, length in enumerate(lengths):
        expected = plain(query[:, row], keys, values, tables[row], 0, length, 0.3)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


def of_sets(batch, hidden, size, experts, dtype=torch.float32, bias=True, down_lies_by_neuron=False):
    """A gated FFN's parameters, hidden states, and a table of sets: of its rows the first is empty, the last full."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    inner = size * experts
    down = random(hidden, inner)
    biases = (random(inner), random(inner), random(hidden)) if bias else (None, None, None)
    weights = Weights(
        random(inner, hidden), random(inner, hidden), down.T.contiguous().T if down_lies_by_neuron else down, *biases
    )
    table = torch.rand(7, experts, generator=generator) < 0.5
    table[0], table[-1] = False, True
    rows = torch.randint(0, 7, (batch,), generator=generator)
    return (torch.randn(batch, hidden, generator=generator)).to(dtype), weights, table, rows


def masked_ffn(hidden, weights, table, rows, activation):
    """In float64: (inner activations, outputs)."""
    gate, up, down, *biases = (None if tensor is None else tensor.double() for tensor in weights)
    x = ACTIVATIONS[activation](linear(hidden.double(), gate, biases[0])) * linear(hidden.double(), up, biases[1])
    x = x * table[rows].repeat_interleave(len(gate) // table.shape[1], 1)
    return x, linear(x, down, biases[2])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "hidden": 16, "size": 8, "experts": 6},
        {"batch": 19, "hidden": 200, "size": 37, "experts": 11},
        {"batch": 3, "hidden": 65, "size": 150, "experts": 3, "bias": False},
        {"batch": 4, "hidden": 96, "size": 40, "experts": 8, "down_lies_by_neuron": True},
        {"batch": 5, "hidden": 72, "size": 24, "experts": 9, "dtype": torch.bfloat16},
    ],
)
def test_working_sets(sizes, activation):
    hidden, weights, table, rows = of_sets(**sizes)
    found = experts_triton.products(hidden, weights, table, rows, activation)
    expected = masked_ffn(hidden, weights, table, rows, activation)
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 2e-2
    for mine, one in zip(found, expected, strict=True):
        assert mine.dtype == hidden.dtype
        torch.testing.assert_close(mine.double(), one, rtol=tolerance, atol=tolerance)
    outside = ~table[rows].repeat_interleave(sizes["size"], 1)
    assert not found[0][outside].any(), "exactly zero outside of the set"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_mates(dtype):
    hidden, weights, table, rows = of_sets(batch=21, hidden=66, size=20, experts=10, dtype=dtype)
    expected = experts_triton.products(hidden, weights, table, rows, "silu")
    for own, count in (([0], 1), ([2, 5], 6), ([0, 11, 18], 21)):
        others = [row for row in range(count) if row not in own]
        mates, sets = hidden[:count].clone(), rows[:count].clone()
        mates[others] = 3 * mates[others].flip(1)
        sets[others] = (sets[others] + 1) % len(table)
        mates[others[:1]] = float("nan")  # a broken mate breaks itself
        found = experts_triton.products(mates, weights, table, sets, "silu")
        for mine, one in zip(found, expected, strict=True):
            assert torch.equal(mine[own], one[own])


def test_many_rows_go_in_turns(monkeypatch):
    hidden, weights, table, rows = of_sets(batch=40, hidden=32, size=8, experts=4)
    expected = experts_triton.products(hidden, weights, table, rows, "silu")
    monkeypatch.setattr(experts_triton, "_MOST", 16)
    found = experts_triton.products(hidden, weights, table, rows, "silu")
    assert all(torch.equal(mine, one) for mine, one in zip(found, expected, strict=True))


def test_what_nobody_chose_is_not_read():
    hidden, weights, table, rows = of_sets(batch=6, hidden=64, size=24, experts=9)
    table[:] = False
    table[:, [2, 7]] = True
    expected = experts_triton.products(hidden, weights, table, rows, "silu")
    for tensor in weights[:2]:
        tensor.view(9, -1)[[0, 1, 3, 4, 5, 6, 8]] = float("nan")
    weights.down.view(64, 9, 24)[:, [0, 1, 3, 4, 5, 6, 8]] = float("nan")
    found = experts_triton.products(hidden, weights, table, rows, "silu")
    assert all(torch.equal(mine, one) for mine, one in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_try_out_is_content(family):
    module = tiny(family, dtype=torch.bfloat16)
    layout = random_layout(module)
    for ffn in ffns(module):
        name = activation_name(ffn.activation())
        assert name == "silu"
        assert 0 < ExpertForward(ffn, layout.layers[ffn.layer]).kernel_error(name) < 0.03


def test_norms():
    hidden = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 2, 48)
    expected = torch.nn.functional.rms_norm(hidden, (48,), weight, 1e-3)
    torch.testing.assert_close(fused_triton.rms_norm(hidden, weight, 1e-3, plus_one=False), expected)
    torch.testing.assert_close(fused_triton.rms_norm(hidden, weight - 1, 1e-3, plus_one=True), expected)
    heads = hidden[..., 12:36].view(2, 3, 2, 12)  # parts of longer rows
    expected = torch.nn.functional.rms_norm(heads, (12,), weight[:12], 1e-3)
    torch.testing.assert_close(fused_triton.rms_norm(heads, weight[:12], 1e-3, plus_one=False), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activations(activation):
    both = torch.randn(3, 2 * 1100, generator=torch.Generator().manual_seed(0))
    expected = ACTIVATIONS[activation](both[:, :1100]) * both[:, 1100:]
    torch.testing.assert_close(fused_triton.gated(both, activation), expected)


def test_a_token_is_stored():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.zeros(2, 9, 24), torch.zeros(2, 9, 16)
    key, value = torch.randn(3, 2, 24, generator=generator).transpose(0, 1), torch.randn(2, 3, 16, generator=generator)
    slots = torch.tensor([4, 0, 7])
    fused_triton.store(keys, values, slots, key, value)
    for slab, new in ((keys, key), (values, value)):
        assert torch.equal(slab, torch.zeros_like(slab).index_copy(1, slots, new))


def test_parts_of_attention_are_merged():
    generator = torch.Generator().manual_seed(0)
    total, part = torch.randn(5, 3, 24, generator=generator), torch.randn(3, 5, 24, generator=generator).transpose(0, 1)
    lse, part_lse = torch.randn(5, 3, generator=generator), 9 * torch.randn(3, 5, generator=generator).T
    expected = prefill_kernels.merge(total, lse, part, part_lse)
    for mine, one in zip(fused_triton.merge(total, lse, part, part_lse), expected, strict=True):
        torch.testing.assert_close(mine, one)


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_fused_model_computes_the_same(family, joins, monkeypatch):
    monkeypatch.setattr(fused, "has_triton", lambda device: True)
    module = tiny(family)
    weights = {name: weight.clone() for name, weight in module.named_parameters()}
    ids = torch.arange(3, 40)[None]
    expected = module(ids).logits
    found = fused.fuse(module, joins=joins)
    layers = len(ffns(module))
    assert found["rotary"] == layers
    assert found["ffns"] == joins * layers
    assert found["projections"] == joins * (family != "phi3") * layers
    assert found["norms"] == sum(type(one).__name__.endswith("RMSNorm") for one in module.modules())
    for _ in range(2):  # what was put together stays so
        torch.testing.assert_close(module(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert fused.fuse(module, joins=joins) == found
    fused.unfuse(module)
    torch.testing.assert_close(module(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(weight, weights[name]) for name, weight in module.named_parameters())


def test_what_computes_something_else_keeps_its_own(monkeypatch):
    """A limit that only large numbers meet, a norm with a bias, positions in another order."""
    monkeypatch.setattr(fused, "has_triton", lambda device: True)
    module = tiny("llama")
    mlp, norm, attention = module.model.layers[0].mlp, module.model.layers[1].input_layernorm, module.model.layers[2]

    class Limited(type(mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))

    class BiasedRMSNorm(type(norm)):
        def forward(self, hidden):
            return super().forward(hidden) + self.bias

    mlp.__class__ = Limited
    norm.__class__, norm.bias = BiasedRMSNorm, torch.nn.Parameter(torch.zeros_like(norm.weight))
    found = fused.fuse(module)
    assert found["ffns"] == found["rotary"] - 1 == 2
    assert "forward" not in mlp.__dict__
    assert "forward" not in norm.__dict__
    assert "forward" in attention.input_layernorm.__dict__


def test_an_engine_on_the_kernel():
    """Up to rounding the answers of torch's form, which reads whole experts' weights one after the other."""
    found, expected = (logprobs_by_kernel(kernel, static=True, new=3) for kernel in ("silu", None))
    assert found == pytest.approx(expected, abs=1e-4)
