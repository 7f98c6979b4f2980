"""Retries and equal prefixes: what was prefilled is not prefilled again, and no bit changes."""

import pytest

from pacellm.model.load import prepare
from pacellm.types import GenerationRequest
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

LONG, SHORT = prompt(1500, 1), prompt(70, 2)


@pytest.fixture(scope="module", params=["llama", "smollm3"])
def model(request):
    return prepare(tiny(request.param))


def engine_for(model, **changes):
    return new_engine(model, max_num_batched_tokens=100, **changes)


def abort_after(engine, item, tokens_done):
    engine.add(item)
    while not engine.scheduler.running or engine.scheduler.running[0].done_work < tokens_done:
        engine.step()
    engine.abort(item.request_id)


@pytest.mark.parametrize("history", [[], SHORT])
def test_a_retry_goes_on_where_the_first_try_was_left(model, history):
    kept, engine = new_engine(model), engine_for(model)
    for e in (kept, engine):
        if history:
            run(e, request("0", history, session="s"))
    wanted = tokens(run(kept, request("1", history + LONG, session="s"))["1"])
    abort_after(engine, request("1", history + LONG, session="s"), 1000)
    assert len(engine.prefix_cache) > 1
    again = run(engine, request("2", history + LONG, session="s"))["2"]
    done = len(history) + 1000
    assert finish(again).usage.cached_tokens >= done - done % 64 - 64
    assert tokens(again) == wanted
    assert_same_banks(banks(engine, "s"), banks(kept, "s"))
    assert_nothing_held(engine)


def test_a_retry_after_the_prompt_was_whole(model):
    kept, engine = new_engine(model), engine_for(model)
    wanted = tokens(run(kept, request("1", LONG, session="s"))["1"])
    abort_after(engine, request("1", LONG, session="s"), 1503)
    again = run(engine, request("2", LONG, session="s"))["2"]
    assert finish(again).usage.cached_tokens >= 1300
    assert tokens(again) == wanted
    assert_same_banks(banks(engine, "s"), banks(kept, "s"))


@pytest.mark.parametrize("steps", range(3, 12))
def test_a_replay_that_goes_back_leaves_kept_progress_alone(model, steps):
    """The log's second turn ends behind the third's beginning: what is kept of the second is not written over."""
    first, longer, branch = prompt(100, 3), prompt(300, 4), prompt(90, 5)
    kept, engine = new_engine(model), engine_for(model)
    for e in (kept, engine):
        for name, ids in (("1", first), ("2", first + longer), ("3", first + longer[:140] + branch)):
            run(e, request(name, ids, session="s"))
    history = first + longer[:140] + branch
    wanted = tokens(run(kept, request("4", history + SHORT, session="s"))["4"])
    engine.sessions.drop(engine.sessions.get(("tenant", "s")))
    engine.add(request("gone", history + prompt(120, 6), session="s"))
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    again = run(engine, request("4", history + SHORT, session="s"))["4"]
    assert tokens(again) == wanted
    assert_same_banks(banks(engine, "s"), banks(kept, "s"))
    assert_nothing_held(engine)


def test_an_aborted_replay_goes_on(model):
    kept, engine = new_engine(model), engine_for(model)
    for e in (kept, engine):
        run(e, request("1", LONG, session="s"))
    assert engine.eviction.evict_one()
    engine.prefix_cache.clear()
    abort_after(engine, request("2", LONG + SHORT, session="s"), 900)
    found = {}
    for name, e in (("kept", kept), ("engine", engine)):
        found[name] = run(e, request("3", LONG + SHORT, session="s"))["3"]
    assert finish(found["engine"]).session == "replayed"
    assert finish(found["engine"]).usage.replayed_tokens < 700
    assert tokens(found["kept"]) == tokens(found["engine"])
    assert_same_banks(banks(engine, "s"), banks(kept, "s"))
    assert_nothing_held(engine)


def test_equal_prefixes_of_one_tenant(model):
    engine = engine_for(model)
    run(engine, request("1", LONG + SHORT))
    other = LONG + prompt(30, 9)
    events = run(engine, request("2", other))["2"]
    assert finish(events).usage.cached_tokens >= 1400
    assert tokens(events) == tokens(run(new_engine(model), request("2", other))["2"])
    half = LONG[:800] + prompt(30, 9)
    events = run(engine, request("3", half))["3"]
    assert finish(events).usage.cached_tokens >= 400
    assert tokens(events) == tokens(run(new_engine(model), request("3", half))["3"])
    # a new session begins where a request without one does
    events = run(engine, request("4", other, session="s"))["4"]
    assert (finish(events).session, finish(events).usage.cached_tokens >= 1400) == ("new", True)
    assert_nothing_held(engine)


def test_never_across_tenants_modes_or_states(model):
    engine = engine_for(model)
    run(engine, request("1", LONG))
    for other in (
        GenerationRequest("2", LONG, GREEDY, tenant="somebody else"),
        GenerationRequest("3", LONG, GREEDY, session=("a third", "s")),
        request("4", LONG, pa="off"),
        request("5", LONG, pa="read_only"),
    ):
        assert finish(run(engine, other)[other.request_id]).usage.cached_tokens == 0
    run(engine, request("6", SHORT, session="s"))
    # the same ids on another state
    assert finish(run(engine, request("7", LONG, session="s"))["7"]).usage.cached_tokens == 0


def test_progress_gives_way(model):
    engine = engine_for(model, kv_cache_memory=5 * 512 * model.bytes_per_token, max_num_seqs=2)
    run(engine, request("1", LONG))
    assert len(engine.prefix_cache) > 0
    other = prompt(2000, 5)
    events = run(engine, request("2", other))["2"]
    assert tokens(events) == tokens(run(new_engine(model), request("2", other))["2"])
    assert_nothing_held(engine)
    rows = engine.pool.num_free
    engine.prefix_cache.clear()
    assert engine.pool.num_free > rows


def test_a_deleted_session_leaves_no_progress(model):
    engine = engine_for(model)
    run(engine, request("1", LONG, session="s"))
    future = engine.call(engine.ops.delete(("tenant", "s")))
    engine.step()
    assert future.result(1)
    assert len(engine.prefix_cache) == 0
    assert engine.allocator.num_free == engine.num_blocks
