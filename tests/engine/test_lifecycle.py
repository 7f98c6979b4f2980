"""Aborts, failures, sessions and limits: nothing leaks, nothing else changes."""

import gc
import threading
import time
import weakref
from array import array

import pytest
import torch

from pacellm import EngineConfig
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.engine.thread import EngineThread
from pacellm.errors import (
    Aborted,
    ConfigError,
    ContextLengthExceeded,
    Draining,
    EngineDead,
    EngineError,
    Overloaded,
    RequestError,
)
from pacellm.model.load import prepare
from pacellm.types import Admitted, Delta, Failed, Finished, FinishReason, Progress, SamplingParams
from tests.engine.helpers import (
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

LONG, SHORT = prompt(900, 1), prompt(40, 2)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


def steps_until(engine, condition, limit=500):
    events = []
    for _ in range(limit):
        events += engine.step()
        if condition(engine):
            return events
    raise AssertionError("the condition was never met")


@pytest.mark.parametrize("moment", ["waiting", "prefill", "decode"])
def test_abort_returns_everything_and_leaves_the_session_as_it_was(model, moment):
    engine = new_engine(model, max_num_batched_tokens=64, max_num_seqs=2)
    run(engine, request("first", SHORT, session="s"))
    before, context = banks(engine, "s"), list(engine.sessions.get(("tenant", "s")).context)
    free_blocks, free_rows = engine.allocator.num_free, engine.pool.num_free
    engine.add(request("victim", SHORT + LONG, session="s"))
    if moment == "prefill":
        steps_until(engine, lambda e: 0 < e.scheduler.running[0].done_work < 500)
    elif moment == "decode":
        steps_until(engine, lambda e: len(e.scheduler.running[0].generated) > 3)
    assert engine.abort("victim")
    assert not engine.abort("victim")
    assert len(engine.prefix_cache) == (0 if moment == "waiting" else 1 if moment == "prefill" else 5)
    engine.prefix_cache.clear()
    assert (engine.allocator.num_free, engine.pool.num_free) == (free_blocks, free_rows)
    assert_nothing_held(engine)
    assert_same_banks(banks(engine, "s"), before)
    assert list(engine.sessions.get(("tenant", "s")).context) == context


def test_an_aborted_first_request_leaves_no_session(model):
    engine = new_engine(model, max_num_batched_tokens=64)
    engine.add(request("x", LONG, session="s"))
    engine.step()
    engine.abort("x")
    assert engine.sessions.get(("tenant", "s")) is None
    assert finish(run(engine, request("y", SHORT, session="s"))["y"]).session == "new"


def test_a_failure_inside_a_step_fails_one_request(model, monkeypatch):
    wanted = tokens(run(new_engine(model), request("good", LONG))["good"])
    engine = new_engine(model, max_num_batched_tokens=128)
    from pacellm.model.attention import cpu as attention_cpu

    original = attention_cpu._attend_full

    def explode(chunk, *rest):
        if any(s.id == "bad" and s.position == chunk.position and s.position > 100 for s in engine.scheduler.running):
            raise RuntimeError("out of memory, say")
        return original(chunk, *rest)

    monkeypatch.setattr(attention_cpu, "_attend_full", explode)
    events = run(engine, request("bad", prompt(700, 5)), request("good", LONG))
    assert isinstance(events["bad"][-1], Failed)
    assert isinstance(events["bad"][-1].error, EngineError)
    assert "out of memory" in str(events["bad"][-1].error)
    assert tokens(events["good"]) == wanted
    assert_nothing_held(engine)


def test_a_failure_leaves_the_kv_that_a_session_shares(model, monkeypatch):
    kept, engine = new_engine(model), new_engine(model)
    for e in (kept, engine):
        run(e, request("1", LONG, session="s"))
    from pacellm.engine import answer as module

    with monkeypatch.context() as patch:
        patch.setattr(module.Answers, "_accept", lambda *_: 1 / 0)
        assert isinstance(run(engine, request("2", LONG + SHORT, session="s"))["2"][-1], Failed)
    found = [run(e, request("3", LONG + SHORT, session="s"))["3"] for e in (kept, engine)]
    assert finish(found[1]).session == "resident"
    assert tokens(found[0]) == tokens(found[1])
    assert_same_banks(banks(engine, "s"), banks(kept, "s"))


def test_logits_that_are_not_finite_fail_one_request_and_stay_behind_nowhere(model):
    engine = new_engine(model, kv_cache_memory=3 * 512 * model.bytes_per_token)
    wanted = tokens(run(new_engine(model), request("good", SHORT))["good"])
    engine.add(request("bad", SHORT))
    engine.scheduler.schedule()
    for slabs in engine.runner._values:
        slabs[:, :512] = torch.nan
    engine.scheduler.running[0].cursor = engine.scheduler.running[0].done_work = 30
    events = run_until_idle(engine)
    assert isinstance(events["bad"][-1], Failed)
    assert "not finite" in str(events["bad"][-1].error)
    assert tokens(run(engine, request("good", SHORT))["good"]) == wanted


def test_the_context_is_what_memory_holds_and_can_be_used_to_the_last_token(model):
    memory = 3 * 512 * model.bytes_per_token
    engine = new_engine(model, kv_cache_memory=memory, session_memory=memory)
    assert engine.config.max_model_len == 1536
    endless = SamplingParams(temperature=0, ignore_eos=True)
    first = prompt(1000, 8)
    one = run(engine, request("1", first, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True), session="s"))
    history = first + tokens(one["1"]) + prompt(20, 3)
    two = run(engine, request("2", history, endless, session="s"))["2"]
    assert finish(two).reason is FinishReason.LENGTH
    assert len(history) + len(tokens(two)) == 1536
    wide = new_engine(model)
    run(wide, request("1", first, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True), session="s"))
    limited = SamplingParams(max_tokens=1536 - len(history), temperature=0, ignore_eos=True)
    assert tokens(two) == tokens(run(wide, request("2", history, limited, session="s"))["2"])
    assert_nothing_held(engine)


def test_a_new_document_in_a_session_may_need_the_room_of_the_old_one(model):
    memory = 6 * 512 * model.bytes_per_token
    old, new = prompt(1800, 8), prompt(1700, 9)
    wide = new_engine(model)
    run(wide, request("old", old, session="s"))
    wanted = tokens(run(wide, request("new", new, session="s"))["new"])
    engine = new_engine(model, kv_cache_memory=memory, session_memory=memory)
    run(engine, request("old", old, session="s"))
    events = run(engine, request("new", new, session="s"))["new"]
    assert finish(events).session == "replayed"
    assert tokens(events) == wanted
    assert_same_banks(banks(engine, "s"), banks(wide, "s"))
    assert_nothing_held(engine)


def test_sessions_continue_and_say_so(model):
    engine = new_engine(model)
    first = run(engine, request("1", LONG, session="s"))["1"]
    history = LONG + tokens(first) + SHORT
    second = finish(run(engine, request("2", history, session="s"))["2"])
    # the last sampled token was never fed
    assert second.usage.cached_tokens == len(LONG) + len(tokens(first)) - 1
    assert (finish(first).session, second.session) == ("new", "resident")
    assert finish(run(engine, request("3", history))["3"]).session == "none"


def test_requests_of_one_session_run_in_order(model):
    engine = new_engine(model, max_num_batched_tokens=64)
    events = run(engine, request("1", LONG, session="s"), request("2", SHORT, session="s"), request("3", SHORT))
    assert [finish(events[name]).session for name in "123"] == ["new", "resident", "none"]


def test_commit_false_and_modes(model):
    engine = new_engine(model)
    run(engine, request("1", LONG, session="s"))
    before = banks(engine, "s")
    events = run(engine, request("2", LONG + SHORT, session="s", commit=False))["2"]
    assert finish(events).usage.cached_tokens > 0
    assert_same_banks(banks(engine, "s"), before)
    read = finish(run(engine, request("3", LONG + SHORT, session="s", pa="read_only"))["3"])
    assert read.bank.hits + read.bank.fuses + read.bank.misses > 0
    assert read.bank.merges == read.bank.replacements == 0
    after = banks(engine, "s")
    assert torch.equal(after[2, "keys"], before[2, "keys"])
    assert finish(run(engine, request("4", SHORT, session="s", pa="off"))["4"]).bank is None
    assert engine.eviction.evict_one()
    # every mode is replayed as it was
    assert finish(run(engine, request("5", SHORT, session="s"))["5"]).session == "replayed"
    assert_nothing_held(engine)


def test_warm_up_generates_nothing_and_commits_its_prompt(model):
    engine = new_engine(model)
    warm = finish(run(engine, request("1", LONG, SamplingParams(max_tokens=0), session="s"))["1"])
    assert (warm.usage.completion_tokens, warm.reason) == (0, FinishReason.LENGTH)
    then = finish(run(engine, request("2", LONG + SHORT, session="s"))["2"])
    assert then.usage.cached_tokens == len(LONG)


def test_idle_sessions_are_evicted_least_recently_used_first(model):
    block = 512 * model.bytes_per_token
    engine = new_engine(model, session_memory=2 * (block + 60_000))
    for name in ("a", "b", "a", "c"):
        run(engine, request(name, SHORT, session=name))
    resident = [name for name in "abc" if engine.sessions.get(("tenant", name)).is_resident]
    assert resident == ["a", "c"]
    assert engine.eviction.evictions == 1
    assert finish(run(engine, request("b", SHORT, session="b"))["b"]).session == "replayed"


def test_a_lost_log_is_said(model):
    engine = new_engine(model, session_log_memory=1000)
    run(engine, request("1", prompt(200, 3), session="old"))
    run(engine, request("2", prompt(200, 4), session="new"))
    assert engine.sessions.get(("tenant", "old")) is None
    assert finish(run(engine, request("3", SHORT, session="old"))["3"]).session == "lost"
    assert finish(run(engine, request("4", SHORT, session="old"))["4"]).session == "resident"


def test_a_long_log_is_folded_and_said_and_replay_starts_from_the_fold(model):
    kept, evicted = new_engine(model, max_model_len=128), new_engine(model, max_model_len=128)
    found = []
    for turn in range(11):
        ends = [
            finish(run(engine, request(str(turn), prompt(60, turn), session="s"))[str(turn)])
            for engine in (kept, evicted)
        ]
        found.append(ends)
        assert_same_banks(banks(kept, "s"), banks(evicted, "s"))
        assert evicted.eviction.evict_one()
    states = [end.session for end, _ in found]
    assert states.count("folded") == 1
    assert found[states.index("folded") + 1][0].usage.cached_tokens == 0
    assert found[-1][1].session == "replayed"
    assert found[-1][1].usage.replayed_tokens < 4 * 128


def test_what_can_never_run_is_refused_before_the_queue(model):
    engine = new_engine(model, max_model_len=1000, kv_cache_memory=3 * 512 * model.bytes_per_token)
    for ids, sampling, param, kind in (
        ([], SamplingParams(), "messages", RequestError),
        (prompt(1000), SamplingParams(), "messages", ContextLengthExceeded),
        (prompt(900), SamplingParams(max_tokens=101), "max_tokens", ContextLengthExceeded),
        ([5, 97], SamplingParams(), "messages", RequestError),
        ([5], SamplingParams(logit_bias=((97, 1.0),)), "logit_bias", RequestError),
    ):
        with pytest.raises(kind) as caught:
            engine.add(request("x", ids, sampling))
        assert caught.value.param == param
    assert not engine.has_work
    with pytest.raises(ConfigError, match="longer than the model's context"):
        Engine(model, EngineConfig(max_model_len=5000))
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        Engine(model, EngineConfig(pa_layers=(3,)))


def test_a_prompt_is_checked_once(model, monkeypatch):
    engine = new_engine(model)
    checked = engine.check(request("x", SHORT))
    assert checked.prompt == array("i", SHORT)
    monkeypatch.setattr(engine.parts.validator, "check", None)  # what it was would be asked again
    assert len(tokens(run(engine, checked)["x"])) == 10
    for bad in ([-1], [2**40], [97]):
        monkeypatch.undo()
        with pytest.raises(RequestError, match="outside the vocabulary"):
            engine.check(request("y", [5, *bad]))


def test_short_requests_are_not_held_up_by_a_long_prompt(model):
    engine = new_engine(model, max_num_batched_tokens=64)
    order = []
    engine.add(request("long", prompt(3000, 1)))
    engine.step()
    engine.add(request("short", SHORT))
    run_until_idle(engine, lambda name, event: order.append(name) if isinstance(event, Finished) else None)
    assert order == ["short", "long"]


def test_progress_adds_up(model):
    engine = new_engine(model, max_num_batched_tokens=200)
    events = run(engine, request("x", LONG))["x"]
    progress = [event for event in events if isinstance(event, Progress)]
    assert isinstance(events[0], Admitted)
    assert [event.processed for event in progress] == [200, 400, 600, 800, 900]
    assert {event.total for event in progress} == {900}


# -- the thread ------------------------------------------------------------------------------------------------


class Inbox:
    """Collects events from the engine thread."""

    def __init__(self):
        self.events, self.changed = {}, threading.Condition()

    def __call__(self, batch):
        with self.changed:
            for name, event in batch:
                self.events.setdefault(name, []).append(event)
            self.changed.notify_all()

    def wait(self, name, kinds=(Finished, Failed), timeout=60):
        with self.changed:
            assert self.changed.wait_for(
                lambda: any(isinstance(event, kinds) for event in self.events.get(name, [])), timeout
            ), f"{name}: {self.events.get(name)}"
            return self.events[name]


@pytest.fixture
def thread(model):
    inbox = Inbox()
    thread = EngineThread(new_engine(model, max_num_batched_tokens=64, max_waiting=3, max_num_seqs=1), inbox)
    thread.inbox = inbox
    thread.start()
    yield thread
    thread.stop()


def test_thread_runs_aborts_and_stops(thread):
    endless = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)
    thread.submit(request("one", SHORT))
    assert isinstance(thread.inbox.wait("one")[-1], Finished)
    thread.submit(request("two", SHORT, endless))
    thread.inbox.wait("two", Delta)
    thread.submit(request("queued", SHORT, endless))
    thread.abort("two")
    assert isinstance(thread.inbox.wait("two")[-1].error, Aborted)
    thread.inbox.wait("queued", Delta)
    thread.stop()
    assert isinstance(thread.inbox.wait("queued")[-1].error, Draining)
    with pytest.raises((Draining, EngineDead)):
        thread.submit(request("late", SHORT))


def test_queue_is_bounded(thread):
    endless = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)
    thread.submit(request("running", SHORT, endless))
    thread.inbox.wait("running", Delta)
    for name in "abc":
        thread.submit(request(name, SHORT))
    with pytest.raises(Overloaded) as caught:
        thread.submit(request("d", SHORT))
    assert caught.value.retry_after > 0
    thread.abort("running")
    for name in "abc":
        assert isinstance(thread.inbox.wait(name)[-1], Finished)


def test_a_dead_engine_ends_every_stream(thread, monkeypatch):
    endless = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)
    thread.submit(request("x", SHORT, endless))
    thread.inbox.wait("x", Delta)
    monkeypatch.setattr(thread.engine, "step", lambda: 1 / 0)
    assert isinstance(thread.inbox.wait("x")[-1].error, EngineDead)
    deadline = time.monotonic() + 10
    while thread.is_alive and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    with pytest.raises(EngineDead):
        thread.submit(request("y", SHORT))


@pytest.mark.parametrize("has_directory", [False, True])
def test_an_engine_that_nobody_keeps_is_freed(model, tmp_path, has_directory):
    """Also one that was never closed and whose worker's thread waits for jobs."""
    engine = new_engine(model, session_host_memory=2**24, session_dir=str(tmp_path) if has_directory else None)
    run(engine, request("a", prompt(40), session="s"))
    assert engine.eviction.evict_one()
    engine.worker.submit(lambda: None, lambda done: None)
    engine.worker.finish()
    freed = [weakref.ref(one) for one in (engine, engine.sessions, engine.runner)]
    del engine
    gc.collect()
    assert [one() for one in freed] == [None] * 3
