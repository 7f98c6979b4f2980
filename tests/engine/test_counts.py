"""Reads of banks are counted once for each token of a history, whoever computed it and however often."""

import pytest

from pacellm.model.load import prepare
from pacellm.types import SamplingParams
from tests.engine.helpers import finish, new_engine, prompt, request, run
from tests.models import tiny

LONG, MORE = prompt(1000, 1), prompt(130, 2)
ANSWER = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("smollm3"))


def read(reads):
    """Tokens by layer."""
    return {layer: one.hits + one.fuses + one.misses + one.empty for layer, one in reads.layers.items()}


def lifetime(engine):
    facts = engine.sessions.get(("tenant", "s")).banks
    return {layer: sum(one[name] for name in ("hits", "fuses", "misses", "empty")) for layer, one in facts.items()}


def abort_after(engine, item, fed):
    engine.add(item)
    while not engine.scheduler.running or engine.scheduler.running[0].done_work < fed:
        engine.step()
    assert engine.abort(item.request_id)


def totals(engine):
    """What all finished requests add up to, by layer."""
    names = ("hits", "fuses", "misses", "empty")
    return {layer: sum(counts[name] for name in names) for (layer, _), counts in engine.stats.bank.items()}


@pytest.mark.parametrize("pa", ["on", "read_only"])
@pytest.mark.parametrize("fed", [90, 400, 1000])
def test_a_prompt_that_was_aborted_and_sent_again(model, pa, fed):
    """Chunks of 90 tokens end in the middle of segments of 64."""
    alone = new_engine(model, max_num_batched_tokens=90)
    wanted = finish(run(alone, request("1", LONG, ANSWER, session="s", pa=pa))["1"]).bank
    assert set(read(wanted).values()) == {len(LONG) + 4}, "the last token is never fed"
    engine = new_engine(model, max_num_batched_tokens=90)
    abort_after(engine, request("gone", LONG, ANSWER, session="s", pa=pa), fed)
    end = finish(run(engine, request("1", LONG, ANSWER, session="s", pa=pa))["1"])
    assert end.usage.cached_tokens > 0
    assert end.bank == wanted
    assert totals(engine) == lifetime(engine) == read(wanted)


def test_a_replay_is_not_counted_again(model):
    ends, engines = [], [new_engine(model), new_engine(model, max_num_batched_tokens=90)]
    for engine in engines:
        run(engine, request("1", LONG, ANSWER, session="s"))
    engines[1].sessions.drop(engines[1].sessions.get(("tenant", "s")))
    engines[1].prefix_cache.clear()
    for engine in engines:
        ends.append(finish(run(engine, request("2", LONG + MORE, ANSWER, session="s"))["2"]))
    assert (ends[0].session, ends[1].session) == ("resident", "replayed")
    assert ends[0].bank == ends[1].bank
    assert set(read(ends[1].bank).values()) == {len(MORE) + 4}
    assert lifetime(engines[0]) == lifetime(engines[1]) == totals(engines[1])
    assert set(lifetime(engines[1]).values()) == {len(LONG + MORE) + 8}


def test_a_replay_that_was_aborted_half_way(model):
    kept, engine = new_engine(model), new_engine(model, max_num_batched_tokens=90)
    for each in (kept, engine):
        run(each, request("1", LONG, ANSWER, session="s"))
    engine.sessions.drop(engine.sessions.get(("tenant", "s")))
    engine.prefix_cache.clear()
    for fed in (400, 300):
        abort_after(engine, request(f"gone {fed}", LONG + MORE, ANSWER, session="s"), fed)
    found = [finish(run(each, request("2", LONG + MORE, ANSWER, session="s"))["2"]).bank for each in (kept, engine)]
    assert found[0] == found[1]
    assert lifetime(kept) == lifetime(engine)


def test_a_prefix_that_another_request_has_read(model):
    engine = new_engine(model, max_num_batched_tokens=90)
    run(engine, request("1", LONG, ANSWER))
    end = finish(run(engine, request("2", LONG + MORE, ANSWER))["2"])
    assert end.usage.cached_tokens > 800
    assert set(read(end.bank).values()) == {len(LONG + MORE) + 4}
    assert end.bank == finish(run(new_engine(model), request("2", LONG + MORE, ANSWER))["2"]).bank


@pytest.mark.parametrize("settings", [{}, {"kv_cache_memory": 3}])
def test_a_request_that_has_to_start_again(model, settings):
    """Both outgrow their first block, and there is a third for one of them; the first one is still there then, however
    slowly the other's prompt is read."""
    settings = {name: blocks * 512 * model.bytes_per_token for name, blocks in settings.items()}
    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    engine = new_engine(model, max_num_batched_tokens=90, **settings)
    ends = run(engine, request("a", prompt(490, 1), sampling), request("b", prompt(490, 2), sampling))
    assert bool(engine.scheduler.preemptions) == bool(settings)
    for name in "ab":
        assert set(read(finish(ends[name]).bank).values()) == {490 + 199}


@pytest.mark.parametrize("tight", [False, True])
def test_choices_count_their_prompt_once(model, tight):
    settings = {"kv_cache_memory": 4 * 512 * model.bytes_per_token} if tight else {}
    engine = new_engine(model, max_num_batched_tokens=90, **settings)
    run(engine, request("1", LONG, ANSWER, n=3))
    assert set(totals(engine).values()) == {len(LONG) + 3 * 4}
