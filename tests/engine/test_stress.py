"""200 random schedules give the tokens and the banks that each request gives alone: to the bit. ``make test-slow``."""

import random

import pytest

from pacellm import PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.model.load import load, prepare
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
from tests.models import tiny

SCHEDULES = 50
LENGTHS = (3, 40, 511, 700, 1100)


@pytest.fixture(scope="module", params=["bundled", "llama", "smollm3", "phi3"])
def setting(request):
    """A model, the config of its banks, and what each prompt gives alone, PA on, by (number, seeded)."""
    if request.param == "bundled":
        model, bank = load(MODEL_PATH), PAConfig(segment=256)
    else:
        model, bank = prepare(tiny(request.param)), BANK
    return model, bank, {}


def sampling(seeded):
    if seeded:
        return SamplingParams(max_tokens=9, temperature=1.0, seed=5, top_p=0.9, ignore_eos=True)
    return SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)


def alone(setting, number, seeded):
    model, bank, known = setting
    if (number, seeded) not in known:
        engine = new_engine(model, bank=bank, max_num_batched_tokens=4096, kv_cache_memory=2**28)
        events = run(engine, request("x", prompt(LENGTHS[number], number), sampling(seeded), session="x"))["x"]
        known[number, seeded] = tokens(events), banks(engine, "x")
    return known[number, seeded]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_random_schedule(setting, seed):
    model, bank, _ = setting
    rng = random.Random(seed)
    blocks = rng.choice([8, 14, 60])
    engine = new_engine(
        model,
        bank=bank,
        max_num_batched_tokens=rng.choice([7, 50, 333, 2048]),
        max_num_mixed_tokens=rng.choice([16, 256]),
        max_num_seqs=rng.choice([2, 4, 8]),
        kv_cache_memory=blocks * 512 * model.bytes_per_token,
        session_memory=rng.choice([0, 2**30]),
    )
    wanted, victims, events = {}, set(), {}
    for name in map(str, range(rng.randint(2, 8))):
        number, seeded = rng.randrange(len(LENGTHS)), rng.random() < 0.3
        wanted[name] = number, seeded
        victims |= {name} if rng.random() < 0.2 else set()
        engine.add(request(name, prompt(LENGTHS[number], number), sampling(seeded), session=name))
    while engine.has_work:
        for name, event in engine.step():
            events.setdefault(name, []).append(event)
        running = engine.scheduler.running
        if running and rng.random() < 0.1 and engine.scheduler.preemptions < 20:
            engine.scheduler.preempt(rng.choice(running))
        for name in victims:
            if rng.random() < 0.1:
                engine.abort(name)
    assert_nothing_held(engine)
    for name, (number, seeded) in wanted.items():
        if name in victims and engine.sessions.get(("tenant", name)) is None:
            continue
        finish(events[name])
        expected, expected_banks = alone(setting, number, seeded)
        assert tokens(events[name]) == expected
        if engine.sessions.get(("tenant", name)).is_resident:
            assert_same_banks(banks(engine, name), expected_banks)
