"""Working sets: what decoded tokens use is the chosen experts, and depends on the session's own history alone."""

import random

import pytest
import torch

from pacellm.engine.stats import EngineStats, per_layer
from pacellm.errors import ConfigError, RequestError
from pacellm.experts.apply import apply_layout
from pacellm.experts.forward import ExpertForward
from pacellm.memory import segment
from pacellm.memory.expert_counts import EXPERTS, UNIT
from pacellm.memory.state import new_bank
from pacellm.memory.working_set import choose
from pacellm.model.load import prepare
from pacellm.types import SamplingParams
from tests.engine.helpers import (
    BANK,
    assert_nothing_held,
    assert_same_banks,
    banks,
    finish,
    new_engine,
    prompt,
    request,
    run,
    tokens,
)
from tests.experts.test_layout import random_layout
from tests.memory.test_bank import feed_rows
from tests.models import tiny

PROMPTS = {"a": prompt(37, 1), "b": prompt(301, 2), "c": prompt(530, 3)}
LONG = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def with_layout(family="llama", dtype=torch.float32):
    """A tiny model with six random experts of eight neurons."""
    module = tiny(family, dtype=dtype)
    return apply_layout(prepare(module), random_layout(module))


@pytest.fixture(scope="module", params=["llama", "phi3"])
def model(request):
    return with_layout(request.param)


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt by itself in one big chunk: tokens and banks."""
    found = {}
    for name, ids in PROMPTS.items():
        engine = new_engine(model, ce_density=0.5, max_num_batched_tokens=4096)
        found[name] = tokens(run(engine, request(name, ids, LONG, session=name))[name]), banks(engine, name)
    return found


def compare(engine, events, alone):
    for name in PROMPTS:
        assert tokens(events[name]) == alone[name][0], name
        assert_same_banks(banks(engine, name), alone[name][1])
    assert_nothing_held(engine)


def logprobs(model, **changes):
    engine = new_engine(model, **changes)
    sampling = SamplingParams(max_tokens=12, temperature=0, logprobs=0, ignore_eos=True)
    events = run(engine, request("c", PROMPTS["c"], sampling))["c"]
    return [one.logprob for event in events for one in getattr(event, "logprobs", ())]


@pytest.mark.parametrize("pa", [False, True])
def test_a_set_is_the_ffn_with_other_neurons_at_zero(model, monkeypatch, pa):
    """By hand, row by row."""
    found, dense = logprobs(model, ce_density=0.5, pa=pa), logprobs(model, pa=pa)

    def by_hand(self, step, chunks, inner):
        for chunk in chunks:
            inner[chunk.stop - 1] *= chunk.mask(self._ffn.layer, inner.shape[1])
        return inner

    monkeypatch.setattr(ExpertForward, "_masked", by_hand)
    assert found == pytest.approx(logprobs(model, ce_density=0.5, pa=pa), abs=1e-4)
    assert found[0] == dense[0]  # the prompt's last token is no decoded one
    assert max(abs(mine - theirs) for mine, theirs in zip(found, dense, strict=True)) > 1e-3


def test_bfloat16():
    model = with_layout(dtype=torch.bfloat16)
    wanted = {}
    for budget in (4096, 61):
        engine = new_engine(model, ce_density=0.5, max_num_batched_tokens=budget)
        wanted[budget] = tokens(run(engine, request("b", PROMPTS["b"], LONG, session="b"))["b"]), banks(engine, "b")
    assert wanted[4096][0] == wanted[61][0]
    assert_same_banks(wanted[4096][1], wanted[61][1])


@pytest.mark.parametrize("budget", [13, 100, 1024])
def test_chunk_budget_and_batch_mates(model, alone, budget):
    engine = new_engine(model, ce_density=0.5, max_num_batched_tokens=budget)
    requests = [request(name, ids, LONG, session=name) for name, ids in PROMPTS.items()]
    others = [request(f"dense {n}", prompt(90, 20 + n), LONG, ce_density=1.0 - n / 4) for n in range(3)]
    compare(engine, run(engine, *requests, *others), alone)


@pytest.mark.parametrize("seed", range(2))
def test_preemption_at_random(model, alone, seed):
    rng = random.Random(seed)
    engine = new_engine(model, ce_density=0.5, max_num_batched_tokens=rng.choice([50, 333]))
    events = {}
    for name, ids in PROMPTS.items():
        engine.add(request(name, ids, LONG, session=name))
    while engine.has_work:
        for name, event in engine.step():
            events.setdefault(name, []).append(event)
        if engine.scheduler.running and engine.scheduler.preemptions < 9 and rng.random() < 0.3:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
    assert engine.scheduler.preemptions
    compare(engine, events, alone)


def test_turns_of_other_densities_evicted_and_replayed(model):
    kept, evicted = new_engine(model), new_engine(model, max_num_batched_tokens=97)
    history = list(PROMPTS["b"])
    for turn, (cut, density) in enumerate(((None, 0.5), (200, 0.25), (None, 1.0), (None, 0.5))):
        history = history[:cut] + prompt(150, 10 + turn)
        results = {}
        for name, engine in (("kept", kept), ("evicted", evicted)):
            asked = request(f"{turn}", history, LONG, session="s", ce_density=density)
            results[name] = tokens(run(engine, asked)[f"{turn}"])
        assert_same_banks(banks(evicted, "s"), banks(kept, "s"))
        assert evicted.eviction.evict_one()
        assert results["kept"] == results["evicted"]
        history += results["kept"]


def test_over_a_restart_from_state_and_from_the_log(model, tmp_path):
    first = new_engine(model, session_dir=str(tmp_path), ce_density=0.5)
    answer = tokens(run(first, request("1", PROMPTS["b"], LONG, session="s"))["1"])
    follow = [*PROMPTS["b"], *answer, *prompt(40, 30)]
    first.close()
    wanted = new_engine(model, ce_density=0.5)
    run(wanted, request("1", PROMPTS["b"], LONG, session="s"))
    expected = tokens(run(wanted, request("2", follow, LONG, session="s"))["2"])
    for lose in (False, True):
        engine = new_engine(model, session_dir=str(tmp_path), ce_density=0.75)
        if lose:
            for path in tmp_path.rglob("state*"):
                path.unlink()
        asked = request("2", follow, LONG, session="s", ce_density=0.5, commit=False)
        events = run(engine, asked)["2"]
        assert finish(events).session == ("replayed" if lose else "restored")
        assert tokens(events) == expected
        engine.close()


def test_choices_use_the_set_of_their_prompt(model, alone):
    engine = new_engine(model, ce_density=0.5)
    events = run(engine, request("b", PROMPTS["b"], LONG, n=3))["b"]
    for index in range(3):
        mine = [event for event in events if getattr(event, "index", None) == index]
        assert tokens(mine) == alone["b"][0]


def test_activity_counts_every_prompt_token_once(model):
    engine = new_engine(model, max_num_batched_tokens=50)
    events = run(engine, request("b", PROMPTS["b"], LONG, session="b", experts=True))["b"]
    found = finish(events).experts
    assert found.keys() == {0, 1, 2}
    for shares in found.values():
        assert sum(shares) == pytest.approx(len(PROMPTS["b"]), rel=1e-4)
    assert engine.expert_activity() == found
    stored = banks(engine, "b")[(EXPERTS, "activity")]
    assert stored.sum(1) / UNIT == pytest.approx(len(PROMPTS["b"]), rel=1e-4)
    again = finish(run(engine, request("2", prompt(20, 5), LONG))["2"])
    assert again.experts is None
    assert sum(engine.expert_activity()[0]) == pytest.approx(len(PROMPTS["b"]) + 20, rel=1e-4)


def test_the_hot_set_is_in_every_set():
    activity, heat = torch.arange(16), torch.zeros(16)
    heat[[3, 1]] = torch.tensor([2.0, 1.0])
    assert choose(activity, heat, 0.25).nonzero()[:, 0].tolist() == [1, 3, 14, 15]
    assert choose(activity, heat, 0.01).nonzero()[:, 0].tolist() == [3]
    assert choose(activity, heat, 1.0).all()
    assert choose(torch.zeros(16, dtype=torch.long), heat, 0.25).nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_similarities_are_about_the_set_on_both_sides():
    """One at a time and together, masked keys are keys of the chosen neurons alone."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(48, generator=generator) < 0.5
    states = [new_bank(BANK, 48, 16, torch.float32, torch.device("cpu")) for _ in range(3)]
    short = new_bank(BANK, int(mask.sum()), 16, torch.float32, torch.device("cpu"))
    for _ in range(20):
        x, y = torch.randn(1, 48, generator=generator).abs(), torch.randn(1, 16, generator=generator)
        for state in states[:2]:
            feed_rows([state], [True], x, y, BANK)
        feed_rows([short], [True], x[:, mask], y, BANK)
        states[2].copy_(states[0])
        x, y = torch.randn(1, 48, generator=generator).abs() * mask, torch.randn(1, 16, generator=generator)
        short.keys.copy_(states[2].keys[:, mask])
        short.values.copy_(states[2].values)
        for name in ("usage", "stamp", "filled", "clock"):
            getattr(short, name).copy_(getattr(states[2], name))
        together = feed_rows([states[2]], [False], x, y, BANK, masks=[mask])
        assert torch.allclose(together, feed_rows([short], [False], x[:, mask], y, BANK), atol=1e-5)
        assert torch.allclose(
            together, segment.read(states[2]._replace(keys=states[2].keys * mask), x, y, BANK).output, atol=1e-5
        )


def test_what_cannot_be_served_is_refused(model):
    with pytest.raises(ConfigError, match="--ce-layout FILE"):
        new_engine(prepare(tiny("llama")), ce_density=0.5)
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        new_engine(model, ce_density=0.0)
    with pytest.raises(RequestError, match="above 0 and at most 1"):
        request("x", [5], ce_density=1.5)
    engine = new_engine(prepare(tiny("llama")))
    for changes, field in (({"ce_density": 0.5}, "pacellm.ce_density"), ({"experts": True}, "pacellm.experts")):
        with pytest.raises(RequestError, match="--ce-layout FILE") as refused:
            engine.check(request("x", [5, 6], **changes))
        assert refused.value.param == field


def test_activity_is_a_metric_by_layer_and_expert():
    stats = EngineStats(experts=torch.tensor([[3, 1], [0, 4]]) * UNIT)
    assert per_layer(stats.experts) == {0: [3.0, 1.0], 1: [0.0, 4.0]}
    assert per_layer(None) == {}
