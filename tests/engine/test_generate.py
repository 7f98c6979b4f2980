"""The packed engine against transformers itself."""

import copy

import pytest
import torch

from pacellm.model.load import prepare
from pacellm.model.patch import patch, unpatch
from pacellm.types import SamplingParams
from tests.engine.helpers import assert_nothing_held, new_engine, prompt, request, run, tokens
from tests.models import FAMILIES, tiny

PROMPTS = [prompt(5, 1), prompt(300, 2), prompt(1100, 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_engine_equals_generate(family):
    plain = tiny(family)
    engine = new_engine(prepare(copy.deepcopy(plain)), pa=False, max_num_batched_tokens=257)
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    events = run(engine, *(request(str(number), ids, sampling) for number, ids in enumerate(PROMPTS)))
    for number, ids in enumerate(PROMPTS):
        expected = plain.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert tokens(events[str(number)]) == expected[0, len(ids) :].tolist()
    assert_nothing_held(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_pa_off_gives_the_unpatched_logits(family):
    ids = PROMPTS[1]
    plain = tiny(family)
    expected = plain(torch.tensor([ids])).logits[0, -1]
    found = {}
    for name, changes, mode in (("unpatched", {"pa": False}, "on"), ("patched", {"pa": True}, "off")):
        engine = new_engine(prepare(copy.deepcopy(plain)), **changes)
        engine.add(request("x", ids, pa=mode))
        found[name] = engine.runner.run(engine.scheduler.schedule()).logits[0]
    assert torch.equal(found["patched"], found["unpatched"])
    torch.testing.assert_close(found["patched"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_changes_nothing_outside_the_engine_and_can_be_taken_back(family):
    model = tiny(family)
    ids = torch.tensor([PROMPTS[0]])
    expected = model(ids).logits
    before = {name: id(module) for name, module in model.named_modules()}
    shapes = patch(model, [0, 2])
    assert [(shape.layer, shape.inner, shape.hidden) for shape in shapes] == [(0, 48, 32), (2, 48, 32)]
    assert torch.equal(model(ids).logits, expected)
    unpatch(model)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_banks_change_the_logits():
    found = {}
    for mode in ("on", "off"):
        engine = new_engine(prepare(tiny("llama")), max_num_batched_tokens=64)
        engine.add(request("x", PROMPTS[1], pa=mode))
        while True:
            output = engine.runner.run(step := engine.scheduler.schedule())
            if output.sampled:
                break
            for work in step.work:
                work.sequence.advance(work.count)
        found[mode] = output.logits[0]
    assert (found["on"] - found["off"]).abs().max() > 1e-3


def test_logprobs_are_the_models():
    plain = tiny("qwen3")
    engine = new_engine(prepare(copy.deepcopy(plain)), pa=False)
    events = run(
        engine, request("x", PROMPTS[1], SamplingParams(max_tokens=3, temperature=0, logprobs=4, ignore_eos=True))
    )
    deltas = [event for event in events["x"] if getattr(event, "token_ids", ())]
    context = list(PROMPTS[1])
    for delta in deltas:
        expected = plain(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        (entry,) = delta.logprobs
        assert entry.token_id == delta.token_ids[0] == int(expected.argmax())
        assert entry.logprob == pytest.approx(float(expected.max()), abs=1e-4)
        assert [token for token, _ in entry.top] == expected.topk(4).indices.tolist()
        context.append(entry.token_id)
