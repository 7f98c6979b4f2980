"""What is measured is what an engine would compute, whether layers are handed out again or not."""

import math

import pytest
import torch

from pacellm.calibration.perplexity import LEAST, Meter, plan
from pacellm.calibration.run import ACTING, BankMeasurement, effect, measure_experts
from pacellm.config import PAConfig
from pacellm.errors import ConfigError
from pacellm.experts.apply import apply_layout
from pacellm.model.load import prepare
from pacellm.types import Delta, PromptScores, SamplingParams
from tests.engine.helpers import new_engine, prompt, request, run
from tests.experts.test_layout import random_layout
from tests.model import family_models
from tests.models import tiny

BANK = PAConfig(preset="reference", bank_size=12, segment=64)
IDS = prompt(192)  # two prompts of a segment each, and as much of an answer


def generated(model, **changes):
    """An engine's greedy answer of 64 tokens to 128, and the log-probabilities that it gave: of the prompt's tokens
    behind the first segment, then of its own."""
    engine = new_engine(model, bank=changes.pop("bank", BANK), **changes)
    sampling = SamplingParams(max_tokens=64, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    events = run(engine, request("a", IDS[:128], sampling))["a"]
    found = [event for event in events if isinstance(event, Delta)]
    tokens = [token for event in found for token in event.token_ids]
    own = [one.logprob for event in found for one in event.logprobs]
    asked = [one.logprob for event in events if isinstance(event, PromptScores) for one in event.logprobs]
    return tokens, asked[64:], own


def together(scores):
    return torch.cat([scores.prompt, scores.decoded])


@pytest.mark.parametrize("preset", ACTING)
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)])
def test_scores_are_those_of_an_engine(preset, layers):
    bank = BANK.of(preset)
    model = prepare(tiny("llama"))
    tokens, asked, own = generated(model, pa_layers=layers, bank=bank)
    meter = Meter(model, IDS[:128] + tokens, bank.segment)
    meter.read_plain()
    found = meter.banks(bank, layers)
    assert (-found.prompt[:63]).tolist() == pytest.approx(asked, abs=2e-5)
    # the first answered token follows the prompt's last
    assert (-torch.cat([found.prompt[63:], found.decoded])).tolist() == pytest.approx(own, abs=2e-5)
    assert (together(found) - together(meter.plain())).abs().max() > 1e-3
    off = generated(model, pa=False)[1]
    assert (-meter.plain().prompt[:63]).tolist() == pytest.approx(off, abs=2e-5)


def test_densities_are_those_of_an_engine():
    module = tiny("llama")
    layout = random_layout(module)
    served = apply_layout(prepare(module), layout)
    tokens, _, own = generated(served, ce_density=0.5, pa=False)
    model = prepare(tiny("llama"))
    meter = Meter(model, IDS[:128] + tokens, BANK.segment)
    meter.read_plain()
    whole, half = meter.densities(apply_layout(model, layout), [0.999, 0.5])
    assert (-half.decoded).tolist() == pytest.approx(own[1:], abs=2e-5)
    assert whole.decoded.tolist() == pytest.approx(meter.plain().decoded.tolist(), abs=2e-5)
    section = measure_experts(meter, apply_layout(prepare(tiny("llama")), layout))
    assert [one.density for one in section.densities] == [0.75, 0.5]
    assert section.layout == layout.digest


@pytest.mark.parametrize("model_type", family_models.HERE)
def test_layers_handed_out_again_are_layers_computed_again(model_type):
    """Over all families: what stands between layers is nothing but hidden states, or it is noticed."""
    model = prepare(family_models.tiny(model_type))
    meter, layers = Meter(model, IDS, 48), list(model.patchable_layers[-2:])
    meter.read_plain()
    assert together(meter.plain()).isfinite().all()
    if not layers:  # routed experts alone: there is nothing more to measure
        return
    found = meter.banks(BANK, layers, 150, 2)
    assert any(meter._known(layers, is_first) for is_first in (False, True)) == meter._outputs.are_whole
    meter._outputs.are_whole = False
    again = meter.banks(BANK, layers, 150, 2)
    assert torch.allclose(together(found), together(again), atol=1e-5)
    assert len(found.prompt) == 26
    assert len(found.decoded) == 25


def test_a_plan_is_two_prompts_and_an_answer():
    found = plan(300, 64)
    assert (found.first, found.answer, found.cuts) == (64, 200, (64, 100, 128, 192, 200))
    assert plan(300, 1024).cuts == (100, 200)
    parts = list(found.parts(50))
    assert parts == [(0, 50), (50, 64), (64, 114), (114, 164), (164, 200), (200, 250), (250, 300)]
    assert [(piece.start, piece.stop, piece.ends) for piece in found.pieces(64, 114)] == [
        (0, 36, True),
        (36, 50, False),
    ]
    assert all(piece.ends and piece.stop == piece.start + 1 for piece in found.pieces(200, 250))
    assert found.scored(0, 300, 1) == list(range(64, 299))
    assert found.scored(100, 110, 4) == [100, 104, 108]


def test_a_model_is_as_it_was_and_a_short_text_is_refused():
    model = prepare(tiny("llama"))
    names = [name for name, _ in model.module.named_modules()]
    meter = Meter(model, IDS, 64)
    meter.read_plain()
    before = meter.plain()
    meter.banks(BANK, [1])
    assert [name for name, _ in model.module.named_modules()] == names
    assert not any("forward" in module.__dict__ for module in model.module.modules())
    meter.read_plain()
    assert torch.equal(together(meter.plain()), together(before))
    with pytest.raises(ConfigError, match=f"at least {LEAST}"):
        Meter(model, IDS[: LEAST - 1], 64)


def test_an_effect_is_a_ratio_with_its_interval():
    plain = torch.zeros(640, dtype=torch.float64)
    noise = torch.randn(640, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1
    found = effect(plain + math.log(1.2) + noise, plain)
    assert found.low < 1.2 < found.high
    assert found.high - found.low == pytest.approx(1.2 * 2 * 1.96 * 0.1 / math.sqrt(640), rel=0.5)
    assert effect(plain, plain).model_dump() == {"ratio": 1.0, "low": 1.0, "high": 1.0, "tokens": 640}
    for strange in (math.nan, math.inf, 400.0):
        assert effect(plain + strange, plain).ratio == 1e9


class Harms:
    """A meter that knows what each layer does, in nats; only whole texts tell what layers do together."""

    def __init__(self, harms, together=0.0):
        self.harms, self.together, self.asked = harms, together, []

    def plan(self):
        return plan(4000, 1024)

    def plain(self, length=None, stride=1):
        return self._scores(0.0)

    def banks(self, config, layers, length=None, stride=1):
        self.asked.append((config.preset, tuple(layers), length))
        return self._scores(sum(self.harms[layer] for layer in layers) + self.together * (len(layers) > 2))

    def _scores(self, nats):
        from pacellm.calibration.perplexity import Scores

        return Scores(*torch.full((2, 64), nats, dtype=torch.float64))

    def banks_cost(self, layers, length=None, stride=1):
        return 1.0


def test_auto_takes_harmless_layers_that_are_harmless_together():
    harms = [0.0, 0.5, 0.001, 0.002, 0.2, 0.003]
    found = BankMeasurement(Harms(harms), BANK, range(6), None).run([(1, 4)])
    assert found.auto == {"reference": [0, 2, 3, 5], "paper": [0, 2, 3, 5]}
    assert found.of("paper", (4, 1)).worst == pytest.approx(math.exp(0.7), rel=1e-4)
    assert found.of("paper", [4]).worst == pytest.approx(math.exp(0.2), rel=1e-4)
    assert found.of("paper", (0, 1)) is None
    assert BankMeasurement(Harms(harms, together=1.0), BANK, range(6), None).run([]).auto["paper"] == [0, 2]
    assert BankMeasurement(Harms([0.5] * 6), BANK, range(6), None).run([]).auto["paper"] == []
    many = BankMeasurement(Harms([0.0] * 30), BANK, range(30), None).run([]).auto["paper"]
    assert (len(many), many[0], many[-1]) == (8, 1, 28)


def test_a_stopped_run_goes_on():
    kept = []
    harms, meter = [0.0, 0.5, 0.0], Harms([0.0, 0.5, 0.0])
    whole = BankMeasurement(meter, BANK, range(3), None, keep=kept.append).run([(0, 1)])
    assert kept[-1] == whole
    for section in kept:
        again = Harms(harms)
        work = BankMeasurement(again, BANK, range(3), section)
        cost = work.cost([(0, 1)])
        assert work.run([(0, 1)]) == whole
        assert meter.asked[-len(again.asked) :] == again.asked or not again.asked
        assert cost >= len(again.asked)
