"""The table of working sets that a device's kernel reads by row: a kernel's path with torch in the kernel's place."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from pacellm.engine.pace import Pace
from pacellm.errors import ConfigError
from pacellm.experts import forward as experts
from pacellm.experts.apply import apply_layout
from pacellm.experts.forward import check_density
from pacellm.experts.gated import activation_name
from pacellm.memory.expert_counts import EXPERTS
from pacellm.memory.working_set import SetTable, choose
from pacellm.model.load import prepare
from pacellm.model.neurons import ffns
from pacellm.run import batch, graphs
from pacellm.types import SamplingParams
from tests.engine.helpers import new_engine, prompt, request, run
from tests.experts.test_layout import random_layout
from tests.memory.test_decode_device import NoWaiting
from tests.models import tiny


def masked_products(hidden, weights, table, rows, activation):
    """What the kernel does, and like it without asking which experts there are."""
    assert activation == "silu"
    gate = F.linear(hidden, weights.gate, weights.gate_bias)
    up = F.linear(hidden, weights.up, weights.up_bias)
    inner = F.silu(gate) * up * table[rows].repeat_interleave(len(weights.gate) // table.shape[1], 1)
    return inner, F.linear(inner, weights.down, weights.down_bias)


def with_layout():
    module = tiny("llama")
    return apply_layout(prepare(module), random_layout(module))


def kernel_engine(kernel, static=False, **changes):
    """An engine whose FFNs use the kernel for that activation; None: torch's form."""
    engine = new_engine(with_layout(), max_num_seqs=16, **changes)
    for ffn in ffns(engine.model.module):
        ffn.module.forward.kernel = kernel
    if static:
        engine.runner.use_static_decode(max_seqs=16, max_tokens=engine.config.max_model_len, capture=False)
    return engine


def logprobs_by_kernel(kernel, static, new=6):
    """Log-probabilities of four requests' tokens, of several densities, decoded together, and of a second turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "BUCKETS", (16,))
        patch.setattr(Pace, "seconds", lambda self, *, decodes, several=False: None)  # chunks by the budget alone
        engine = kernel_engine(kernel, static, max_num_batched_tokens=64)
        sampling = SamplingParams(max_tokens=new, temperature=0, logprobs=0, ignore_eos=True)
        asked = [
            request("a", prompt(40, 1), sampling, session="a", ce_density=0.5),
            request("b", prompt(90, 2), sampling, ce_density=0.25, pa="off"),
            request("c", prompt(50, 3), sampling),
        ]
        events = run(engine, *asked)
        again = request("again", [*prompt(40, 1), *prompt(30, 4)], sampling, session="a", ce_density=0.3)
        events |= run(engine, again)
    return [one.logprob for name in sorted(events) for event in events[name] for one in getattr(event, "logprobs", ())]


@pytest.mark.parametrize("static", [False, True])
def test_a_kernel_by_table_equals_torchs_form(monkeypatch, static):
    taken = []

    def products(*args):
        taken.append(len(args[3]))
        return masked_products(*args)

    monkeypatch.setitem(sys.modules, "pacellm.experts.kernel", SimpleNamespace(products=products))
    expected = logprobs_by_kernel(None, static)
    assert not taken
    found = logprobs_by_kernel("silu", static)
    assert len(found) == 24
    assert found == pytest.approx(expected, abs=1e-4)
    assert (16 if static else 2) in taken


def test_a_static_step_only_reads_sets_and_waits_for_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pacellm.experts.kernel", SimpleNamespace(products=masked_products))
    monkeypatch.setattr(graphs, "BUCKETS", (16,))
    engine = kernel_engine("silu", static=True, pa=False)
    forward = experts.ExpertForward._static
    calls = []

    def watched(self, *args):
        calls.append(self)
        with NoWaiting():
            return forward(self, *args)

    monkeypatch.setattr(experts.ExpertForward, "_static", watched)
    engine.add(request("a", prompt(40, 1), ce_density=0.5))
    while not (sequence := engine.scheduler.running[0] if engine.scheduler.running else None) or sequence.pending != 1:
        engine.step()
    assert sequence.working_sets == {}
    with NoWaiting():
        batch.choose_sets([sequence], engine.pool)
    activity = engine.pool.banks(sequence.row)[EXPERTS].activity
    for layer, chosen in sequence.working_sets.items():
        heat = engine.model.layout.layers[layer].heat
        assert torch.equal(chosen, choose(activity[layer], heat, 0.5))
        assert torch.equal(engine.pool.sets.layers[layer][sequence.row], chosen)
    assert sequence.working_sets.keys() == {0, 1, 2}
    while engine.has_work:
        engine.step()
    assert len(calls) >= 3 * 8


def test_rows_of_the_table():
    heat = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    table = SetTable(heat, 4, torch.device("cpu"))
    assert table.everything == 5
    assert all(layer[5].all() and not layer[4].any() for layer in table.layers)
    activity = torch.randint(0, 9, (3, 8), generator=torch.Generator().manual_seed(1))
    whole = table.write_all(2, activity, 0.5)
    for layer in range(3):
        assert torch.equal(whole[layer], choose(activity[layer], heat[layer], 0.5))
        assert torch.equal(table.write(3, activity, 0.5, layer), whole[layer])
        assert int(table.layers[layer].sum()) == 4 + 4 + 8


def test_activations_are_known_by_what_they_do():
    from transformers.activations import ACT2FN

    names = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    assert {name: activation_name(ACT2FN[name]) for name in names} == names
    assert activation_name(ACT2FN["quick_gelu"]) is None
    assert activation_name(ACT2FN["relu2"]) is None


def test_a_device_without_the_kernel_says_why(monkeypatch):
    model = with_layout()
    check_density(0.5, model.module, model.layout, "ce_density")
    monkeypatch.setattr(experts, "why_no_kernel", lambda module, layout: "the kernel is off")
    with pytest.raises(ConfigError, match="the kernel is off"):
        check_density(0.5, model.module, model.layout, "ce_density")
    assert check_density(1.0, model.module, model.layout, "ce_density") is None
