"""Every served family, as a tiny random model: the packed engine against a plain forward pass, banks off and
observed against an unpatched model, banks on against a plain loop, and neurons that can be permuted."""

import copy

import pytest
import torch

from pacellm import PAConfig
from pacellm.errors import ConfigError, ModelError
from pacellm.model.load import prepare
from pacellm.model.neurons import ffns
from pacellm.types import SamplingParams
from tests.engine.helpers import finish, new_engine, prompt, request, run, tokens
from tests.model.bank_reference import Loop
from tests.model.family_models import FAMILIES, HERE, IS_OLD, TAUGHT_LATER, tiny

BANK = PAConfig(preset="reference", bank_size=12, segment=16, theta_high=0.6, theta_low=0.15, alpha=0.5)
NUM_TOKENS = 4
PROMPTS = {"long": prompt(70, seed=1), "short": prompt(33, seed=2)}
IN_DOUBLE = ("nanochat",)
"""Families whose tiny model has a read at a threshold, which float32's rounding decides."""
CLOSE = {"rtol": 2e-3, "atol": 2e-3}


def answers(model, *, mode="on", **config):
    """{name: (ids, logits [NUM_TOKENS, V])} of the prompts answered at once, cut into steps of 48 tokens."""
    engine = new_engine(model, max_num_batched_tokens=48, bank=BANK, kv_cache_memory=16 * 2**20, **config)
    rows, forward = {}, engine.runner.run

    def spy(step):
        output = forward(step)
        for sequence, row in zip(output.sampled, output.logits, strict=False):
            rows.setdefault(sequence.request.request_id, []).append(row.clone())
        return output

    engine.runner.run = spy
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    events = run(engine, *(request(name, ids, sampling, pa=mode) for name, ids in PROMPTS.items()))
    for name in PROMPTS:
        finish(events[name])
    return {name: (ids + tokens(events[name]), torch.stack(rows[name])) for name, ids in PROMPTS.items()}


def assert_as_plain(found, logits_of):
    """Every sampled row is what ``logits_of(name, ids)`` gives at its position."""
    for name, (ids, rows) in found.items():
        start = len(PROMPTS[name]) - 1
        expected = logits_of(name, ids[:-1])[start:]
        torch.testing.assert_close(rows, expected, **CLOSE)


def plain_logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


# gpt_bigcode's module says so when it is imported under transformers 5.17
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", HERE)
def test_family(family):
    plain = tiny(family)
    if family in IN_DOUBLE:
        plain = plain.double()
    model = prepare(copy.deepcopy(plain))
    off = answers(model, pa=False)
    assert_as_plain(off, lambda _, ids: plain_logits(plain, ids))

    able = model.patchable_layers
    if not able:
        assert FAMILIES[family].routed
        with pytest.raises(ConfigError, match="--no-pa"):
            new_engine(model)
        return
    layers = (able[0], able[-1]) if len(able) > 1 else able
    for mode in ("off", "observe"):
        unchanged = answers(model, mode=mode, pa_layers=layers)
        for name in PROMPTS:
            if (
                mode == "observe" and FAMILIES[family].routed
            ):  # a bank wants rows that nobody else reads (docs/models.md)
                torch.testing.assert_close(unchanged[name][1], off[name][1], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(unchanged[name][1], off[name][1])

    changed = 0

    def looped(name, ids):
        nonlocal changed
        length, segment = len(PROMPTS[name]), BANK.segment
        cuts = [*range(segment, length, segment), *range(length, len(ids) + 1)]
        loops = {layer: Loop(BANK, cuts) for layer in layers}
        found = ffns(plain)
        handles = [found[layer].down.register_forward_hook(loop.hook) for layer, loop in loops.items()]
        logits = plain_logits(plain, ids)
        for handle in handles:
            handle.remove()
        changed += sum(loop.changed for loop in loops.values())
        return logits

    assert_as_plain(answers(model, pa_layers=layers), looped)
    assert changed > 20


@pytest.mark.skipif(not IS_OLD, reason="this transformers serves them")
@pytest.mark.parametrize("family", TAUGHT_LATER)
def test_what_an_older_transformers_cannot_do_is_refused(family):
    with pytest.raises(ModelError, match="does not take attention functions"):
        new_engine(prepare(tiny(family)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", HERE)
def test_neurons_can_be_permuted(family):
    model = tiny(family)
    before = plain_logits(model, PROMPTS["short"])
    generator, moved = torch.Generator().manual_seed(0), 0
    for ffn in ffns(model):
        if ffn is not None:
            order = torch.randperm(ffn.inner, generator=generator)
            for axis in ffn.axes():
                assert axis.size == ffn.inner
                axis.view.copy_(axis.view.index_select(axis.dim, order))
                moved += 1
            assert callable(ffn.activation())
    assert moved or FAMILIES[family].routed
    torch.testing.assert_close(plain_logits(model, PROMPTS["short"]), before, rtol=1e-4, atol=1e-4)
    if moved:  # the other way round: one projection alone moved does change them
        ffn = next(ffn for ffn in ffns(model) if ffn is not None)
        axis = next(axis for axis in ffn.axes() if axis.role == "down")
        axis.view.copy_(axis.view.flip(axis.dim))
        assert not torch.allclose(plain_logits(model, PROMPTS["short"]), before, rtol=1e-2, atol=1e-2)
