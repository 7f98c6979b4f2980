"""What a request answers, and what its banks hold, does not depend on how the work was scheduled: to the bit."""

import random

import pytest
import torch

from pacellm.model.load import prepare
from pacellm.types import SamplingParams
from tests.engine.helpers import (
    GREEDY,
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
from tests.models import tiny

ARCHITECTURES = ["llama", "smollm3", "phi3"]
PROMPTS = {"a": prompt(37, 1), "b": prompt(701, 2), "c": prompt(1130, 3)}
SAMPLED = SamplingParams(max_tokens=10, temperature=1.0, seed=7, ignore_eos=True, frequency_penalty=0.5)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return prepare(tiny(request.param))


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt by itself in one big chunk: tokens and banks."""
    found = {}
    for name, ids in PROMPTS.items():
        engine = new_engine(model, max_num_batched_tokens=4096)
        events = run(engine, request(name, ids, session=name))
        found[name] = tokens(events[name]), banks(engine, name)
        assert finish(events[name]).bank.hits > 0, "the banks must be in play"
    return found


def compare(engine, events, alone, names=PROMPTS):
    for name in names:
        assert tokens(events[name]) == alone[name][0], name
        assert_same_banks(banks(engine, name), alone[name][1])
    assert_nothing_held(engine)


@pytest.mark.parametrize("budget", [13, 100, 1024])
def test_chunk_budget_and_batch_mates(model, alone, budget):
    engine = new_engine(model, max_num_batched_tokens=budget)
    compare(engine, run(engine, *(request(name, ids, session=name) for name, ids in PROMPTS.items())), alone)


def test_threads(model, alone):
    torch.set_num_threads(2)
    try:
        engine = new_engine(model, max_num_batched_tokens=300)
        compare(engine, run(engine, *(request(name, ids, session=name) for name, ids in PROMPTS.items())), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("seed", range(3))
def test_preemption_at_random(model, alone, seed):
    rng = random.Random(seed)
    engine = new_engine(model, max_num_batched_tokens=rng.choice([50, 333]))
    events = {}
    for name, ids in PROMPTS.items():
        engine.add(request(name, ids, session=name))
    while engine.has_work:
        for name, event in engine.step():
            events.setdefault(name, []).append(event)
        if engine.scheduler.running and engine.scheduler.preemptions < 9 and rng.random() < 0.3:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
    assert engine.scheduler.preemptions
    compare(engine, events, alone)


def test_preemption_for_want_of_memory(model, alone):
    block = 512 * model.bytes_per_token
    engine = new_engine(model, kv_cache_memory=5 * block, session_memory=0)
    sampling = SamplingParams(max_tokens=450, temperature=0, ignore_eos=True)
    wanted = {}
    for name in ("a", "b"):
        wanted[name] = tokens(run(new_engine(model), request(name, PROMPTS[name], sampling))[name])
    events = run(engine, *(request(name, PROMPTS[name], sampling) for name in ("a", "b")))
    events |= run(engine, request("c", PROMPTS["c"]))
    assert {name: tokens(events[name]) for name in ("a", "b")} == wanted
    assert tokens(events["c"]) == alone["c"][0]
    assert_nothing_held(engine)


def test_scattered_blocks(model, alone):
    """KV in many runs gives what KV in one run gives."""
    engine = new_engine(model, check_integrity=False)  # blocks of other owners stay in between
    engine.allocator.allocate(engine.num_blocks)
    engine.allocator.release(list(range(0, engine.num_blocks, 2)))
    events = run(engine, *(request(name, ids, session=name) for name, ids in PROMPTS.items()))
    for name in PROMPTS:
        assert len(engine.sessions.get(("tenant", name)).table.runs()) == -(-(len(PROMPTS[name]) + 9) // 512)
        assert tokens(events[name]) == alone[name][0]
        assert_same_banks(banks(engine, name), alone[name][1])


def test_turns_evicted_and_replayed(model):
    """Three turns, one of which edits history; evicted after each turn against never evicted."""
    kept, evicted = new_engine(model), new_engine(model, max_num_batched_tokens=97)
    history = list(PROMPTS["b"])
    for turn, cut in enumerate((None, 400, None)):
        history = history[:cut] + prompt(150, 10 + turn)
        results = {}
        for name, engine in (("kept", kept), ("evicted", evicted)):
            events = run(engine, request(f"{turn}", history, session="s"))[f"{turn}"]
            results[name] = tokens(events), finish(events)
        assert_same_banks(banks(evicted, "s"), banks(kept, "s"))
        assert evicted.eviction.evict_one()
        assert results["kept"][0] == results["evicted"][0]
        assert results["kept"][1].session == ("new", "resident", "resident")[turn]
        assert results["evicted"][1].session == ("new", "replayed", "replayed")[turn]
        history += results["kept"][0]
    assert_nothing_held(kept)
    assert_nothing_held(evicted)


def test_seeded_sampling_does_not_depend_on_company(model):
    one = tokens(run(new_engine(model), request("x", PROMPTS["a"], SAMPLED))["x"])
    engine = new_engine(model, max_num_batched_tokens=64)
    many = run(
        engine, request("x", PROMPTS["a"], SAMPLED), request("y", PROMPTS["b"]), request("z", PROMPTS["c"], SAMPLED)
    )
    assert tokens(many["x"]) == one
    assert len(set(one)) > 3


def test_bfloat16():
    model = prepare(tiny("llama", dtype=torch.bfloat16))
    wanted = {}
    for budget in (4096, 61):
        engine = new_engine(model, max_num_batched_tokens=budget)
        events = run(engine, request("b", PROMPTS["b"], session="b"))
        wanted[budget] = tokens(events["b"]), banks(engine, "b")
    assert wanted[4096][0] == wanted[61][0]
    assert_same_banks(wanted[4096][1], wanted[61][1])


def test_greedy_is_the_default_of_these_tests():
    assert GREEDY.temperature == 0
