"""Whatever fails outside the forward pass fails one request or one operation; the loop goes on, and counts it."""

import threading

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.engine.integrity import IntegrityError
from pacellm.engine.thread import EngineThread
from pacellm.errors import EngineError
from pacellm.model.load import prepare
from pacellm.sessions.operation_queue import WAIT
from pacellm.types import Delta, Failed, SamplingParams
from tests.engine.helpers import assert_nothing_held, finish, new_engine, prompt, request, run, tokens
from tests.engine.test_lifecycle import Inbox
from tests.models import tiny

KEY = ("tenant", "s")
LONG, SHORT = prompt(300, 1), prompt(40, 2)
STEADY = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


@pytest.fixture(scope="module")
def steady(model):
    return tokens(run(new_engine(model), request("steady", SHORT, STEADY))["steady"])


@pytest.fixture
def thread(model):
    inbox = Inbox()
    thread = EngineThread(new_engine(model, max_num_batched_tokens=64), inbox)
    thread.inbox = inbox
    thread.start()
    yield thread
    thread.stop()


def counts(engine):
    return {place: count for place, count in engine.faults.counts.items() if count}


def test_giving_up_on_an_operation_at_any_moment(thread, steady):
    thread.submit(request("steady", SHORT, STEADY, session="s"))
    thread.inbox.wait("steady", Delta)
    waiting = thread.call(thread.engine.ops.reset(KEY))  # for the request that runs
    assert waiting.cancel()
    entered, left, made = threading.Event(), threading.Event(), []

    def slow():
        entered.set()
        assert left.wait(10)
        return made.append(1)

    running = thread.call(slow)
    assert entered.wait(10)
    assert running.cancel()
    left.set()

    def failing():
        entered.set()
        assert left.wait(10)
        raise ValueError("on purpose")

    entered.clear()
    left.clear()
    running = thread.call(failing)
    assert entered.wait(10)
    assert running.cancel()
    left.set()
    assert tokens(thread.inbox.wait("steady")) == steady
    assert thread.call(thread.engine.ops.show(KEY)).result(10)["commits"] == 1, "a reset that was given up did nothing"
    assert made == [1]
    assert counts(thread.engine) == {"operation": 1}
    assert thread.is_alive


def test_giving_up_on_what_the_worker_does(model, tmp_path):
    engine = new_engine(model, session_dir=str(tmp_path))
    run(engine, request("1", SHORT, session="s"))
    for operation in (
        engine.ops.reset(KEY),
        engine.ops.delete(KEY),
        engine.ops.delete_all("tenant"),
        engine.ops.fork(KEY, ("tenant", "t"), None),
    ):
        future = engine.call(operation)
        engine.step()
        future.cancel()
        run_until_idle(engine)
    assert counts(engine) == {}
    assert finish(run(engine, request("2", SHORT, session="s"))["2"])
    engine.close()


def test_the_end_comes_whole_where_somebody_gave_up(model, tmp_path):
    engine = new_engine(model, session_dir=str(tmp_path))
    inbox = Inbox()
    thread = EngineThread(engine, inbox)
    thread.start()
    thread.submit(request("1", SHORT, session="s"))
    inbox.wait("1")
    futures = [thread.call(lambda: WAIT) for _ in range(2)]
    futures[0].cancel()
    thread.stop()
    assert isinstance(futures[1].exception(1), EngineError | Exception)
    assert new_engine(model, session_dir=str(tmp_path)).mover.disk.sizes(KEY)[0] > 0, "sessions were saved"


def test_a_result_that_cannot_be_taken(thread, steady):
    thread.submit(request("steady", SHORT, STEADY))
    thread.call(lambda: thread.engine.worker.submit(lambda: 1, lambda done: 1 / 0) and None).result(10)
    assert tokens(thread.inbox.wait("steady")) == steady
    assert counts(thread.engine) == {"worker": 1}


def test_events_that_cannot_be_delivered_end_their_request(model, steady):
    inbox, lost = Inbox(), []

    def deliver(batch):
        if any(name == "lost" and isinstance(event, Delta) for name, event in batch) and not lost:
            lost.append(1)
            raise ValueError("on purpose")
        inbox(batch)

    thread = EngineThread(new_engine(model), deliver)
    thread.start()
    thread.submit(request("lost", LONG))
    assert isinstance(inbox.wait("lost")[-1].error, EngineError)
    thread.submit(request("steady", SHORT, STEADY))
    assert tokens(inbox.wait("steady")) == steady
    assert counts(thread.engine) == {"delivery": 1}
    assert (thread.num_running, thread.num_queued) == (0, 0)
    thread.stop()


@pytest.mark.parametrize("session", [None, "s"])
@pytest.mark.parametrize("where", ["plan", "new_banks", "use"])
def test_an_admission_that_fails(model, steady, monkeypatch, where, session):
    engine = new_engine(model)
    admission = engine.scheduler.admission
    place = {"plan": admission.planner, "new_banks": engine.scheduler.cache, "use": engine.sessions}
    name = {"plan": "plan", "new_banks": "new_banks", "use": "open"}[where]
    if where == "use" and session is None:
        session = "t"
    original = getattr(place[where], name)

    def failing(*arguments):
        considered = admission.considered
        if considered is not None and considered.id == "bad":
            raise ValueError("on purpose")
        return original(*arguments)

    if where != "use" and session:
        run(engine, request("0", SHORT, session=session))
    monkeypatch.setattr(place[where], name, failing)
    events = run(engine, request("steady", SHORT, STEADY), request("bad", SHORT + LONG, session=session),
                 request("also", SHORT, STEADY))  # fmt: skip
    assert isinstance(events["bad"][-1], Failed)
    assert "on purpose" in str(events["bad"][-1].error)
    assert tokens(events["steady"]) == tokens(events["also"]) == steady
    assert counts(engine) == {"admission": 1}
    monkeypatch.undo()
    if session:
        assert finish(run(engine, request("again", SHORT + LONG, session=session))["again"])
    assert_nothing_held(engine)


@pytest.mark.parametrize("where", ["keep", "_finish", "_accept"])
def test_a_commit_that_fails(model, steady, monkeypatch, where):
    engine = new_engine(model)
    owner = engine.scheduler if where == "keep" else engine.parts.answers
    original = getattr(owner, where)

    def failing(item, *arguments):
        if (item if where == "keep" else item.sequence).id == "bad":
            raise ValueError("on purpose")
        return original(item, *arguments)

    monkeypatch.setattr(owner, where, failing)
    bad = SamplingParams(max_tokens=0 if where == "_finish" else 5, temperature=0, ignore_eos=True)
    events = run(engine, request("steady", SHORT, STEADY), request("bad", LONG, bad, session="s"))
    assert isinstance(events["bad"][-1], Failed)
    assert tokens(events["steady"]) == steady
    assert sum(counts(engine).values()) == (where != "_accept")
    assert_nothing_held(engine)


def test_a_failure_that_belongs_to_nobody(thread, steady, monkeypatch):
    original, failures = thread.engine.scheduler.cache.take_copies, []

    def failing():
        if not failures:
            failures.append(1)
            raise ValueError("on purpose")
        return original()

    thread.submit(request("steady", SHORT, STEADY, session="s"))
    thread.inbox.wait("steady", Delta)
    monkeypatch.setattr(thread.engine.scheduler.cache, "take_copies", failing)
    assert "on purpose" in str(thread.inbox.wait("steady")[-1].error)
    thread.submit(request("again", SHORT, STEADY, session="s"))
    assert tokens(thread.inbox.wait("again")) == steady
    assert counts(thread.engine) == {"step": 1}
    assert thread.is_alive


def test_memory_that_does_not_add_up_ends_the_engine(model, monkeypatch):
    engine = new_engine(model, check_integrity=False)
    engine.add(request("x", LONG))
    engine.step()
    engine.allocator.allocate(1)
    monkeypatch.setattr(engine.parts.committer, "commit", lambda flight: 1 / 0)
    with pytest.raises(IntegrityError):
        engine.step()


def test_what_the_disk_says_cannot_be_taken(model, tmp_path, monkeypatch):
    engine = new_engine(model, session_dir=str(tmp_path))
    run(engine, request("1", SHORT, session="s"))
    engine.close()
    engine = new_engine(model, session_dir=str(tmp_path))
    monkeypatch.setattr(engine.mover.claims, "_take", lambda *_: 1 / 0)
    future = engine.call(engine.ops.show(KEY))
    events = run(engine, request("x", SHORT, session="s"), request("y", SHORT))
    assert isinstance(events["x"][-1], Failed)
    assert finish(events["y"])
    assert "division" in str(future.exception(1))
    monkeypatch.undo()
    assert finish(run(engine, request("2", SHORT, session="s"))["2"]).session == "restored"


def test_a_commit_on_disk_that_cannot_be_taken(model, tmp_path, monkeypatch):
    engine = new_engine(model, session_dir=str(tmp_path))
    monkeypatch.setattr(engine.parts.answers, "_end", lambda state: 1 / 0)
    events = run(engine, request("x", SHORT, session="s"))
    assert isinstance(events["x"][-1], Failed)
    assert counts(engine) == {"commit": 1}
    monkeypatch.undo()
    assert_nothing_held(engine)


def test_an_expiry_that_fails(thread, steady, monkeypatch):
    thread.submit(request("1", SHORT, session="s"))
    thread.inbox.wait("1")
    session = thread.engine.sessions.get(KEY)
    failed = threading.Event()

    def failing(session):
        failed.set()
        raise ValueError("on purpose")

    monkeypatch.setattr(thread.engine.ops, "expire", failing)
    session.ttl = -1.0
    assert failed.wait(10)
    session.ttl = None
    thread.submit(request("steady", SHORT, STEADY))
    assert tokens(thread.inbox.wait("steady")) == steady
    assert thread.engine.faults.counts["expiry"] >= 1
