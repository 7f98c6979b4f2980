"""The session directory's bytes: who gives way, what the next request is told, and that nothing in use ever goes."""

import dataclasses

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.engine.thread import EngineThread
from pacellm.errors import ConfigError
from pacellm.model.load import prepare
from pacellm.server.metrics import Metrics
from pacellm.sessions.disk import LOG, STATE, Disk
from tests.engine.helpers import assert_nothing_held, finish, new_engine, prompt, request, run, tokens
from tests.models import tiny


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


def ask(engine, name, tenant="tenant", turn=0):
    """A turn in a session; its end, and its answer."""
    item = request(f"{tenant} {name} {turn}", prompt(200, len(name) + turn))
    item = dataclasses.replace(item, session=(tenant, name), tenant=tenant)
    events = run(engine, item)[item.request_id]
    run_until_idle(engine)
    return finish(events), tokens(events)


def rest(engine):
    """Everything idle goes to disk."""
    while engine.eviction.evict_one():
        run_until_idle(engine)


def files(engine, name, tenant="tenant"):
    engine.worker.finish()
    return {path.name for path in engine.mover.disk.folder((tenant, name)).iterdir()} - {"lock", "owner.json"}


def on_disk(directory):
    """Bytes of all files of sessions."""
    return sum(path.stat().st_size for path in directory.glob("*/*") if path.parent.name != "servers")


def filled(model, path, names, size=None, **settings):
    engine = new_engine(model, session_dir=str(path), session_disk_size=size, max_model_len=512, **settings)
    for name in names:
        ask(engine, name)
        rest(engine)
    return engine


@pytest.fixture(scope="module")
def sizes(model, tmp_path_factory):
    """(log, state) bytes of a session of one turn."""
    engine = filled(model, tmp_path_factory.mktemp("sizes"), "a")
    return engine.mover.disk.sizes(("tenant", "a"))[:2]


def test_bytes_are_counted_as_they_are(model, tmp_path):
    engine = filled(model, tmp_path, "abc")
    assert engine.mover.files.usage.bytes == on_disk(tmp_path) > 0
    engine.ops.delete(("tenant", "b"))()
    run_until_idle(engine)
    held = engine.mover.files.usage
    assert held.bytes == sum(engine.mover.disk.sizes(("tenant", name)).all for name in "ac")
    engine.close()
    after = new_engine(model, session_dir=str(tmp_path)).mover.files.usage
    assert (after.log_bytes, after.state_bytes) == (held.log_bytes, held.state_bytes)


def test_a_session_deleted_while_it_is_saved_leaves_no_bytes(model, tmp_path):
    engine = filled(model, tmp_path, "a")
    ask(engine, "b")
    assert engine.eviction.evict_one()
    assert engine.sessions.get(("tenant", "b")).moving
    engine.ops.delete(("tenant", "b"))()
    run_until_idle(engine)
    assert engine.mover.files.usage.bytes == engine.mover.disk.sizes(("tenant", "a")).all
    assert ask(engine, "b", turn=1)[0].session == "new"


def test_states_give_way_before_logs_and_the_longest_unused_first(model, tmp_path, sizes):
    log, state = sizes
    engine = filled(model, tmp_path, "abcd", size=4 * log + 2 * state + state // 2)
    assert [STATE in files(engine, name) for name in "abcd"] == [False, False, True, True]
    assert all(LOG in files(engine, name) for name in "abcd")
    assert engine.mover.files.budget.states_dropped == 2
    assert engine.mover.files.usage.bytes <= engine.config.session_disk_size
    end, answer = ask(engine, "a", turn=1)
    assert end.session == "replayed"
    wanted = filled(model, tmp_path / "free", "a")
    assert ask(wanted, "a", turn=1)[1] == answer
    assert ask(engine, "d", turn=1)[0].session == "restored"


def test_a_session_whose_log_goes_is_lost_and_said_so_after_a_restart(model, tmp_path, sizes):
    log, _ = sizes
    size = 3 * log + log // 2
    engine = filled(model, tmp_path, ["a", "bb", "ccc", "dddd", "eeeee"], size=size, session_log_memory=0)
    run_until_idle(engine)
    assert engine.mover.files.usage.bytes <= size
    assert engine.mover.files.budget.logs_dropped == engine.sessions.losses == 2
    assert [files(engine, name) for name in ("a", "bb")] == [set(), set()]
    assert ask(engine, "a", turn=1)[0].session == "lost"
    engine.close()
    again = new_engine(model, session_dir=str(tmp_path))
    assert ask(again, "bb", turn=1)[0].session == "lost"
    assert ask(again, "dddd", turn=1)[0].session in ("restored", "replayed")
    assert_nothing_held(again)


def test_memory_keeps_the_session_whose_log_left_the_disk(model, tmp_path, sizes):
    log, _ = sizes
    engine = filled(model, tmp_path, ["a", "bb", "ccc"], size=2 * log, session_sync=True)
    assert files(engine, "a") == set()
    assert engine.sessions.losses == 0
    assert ask(engine, "a", turn=1)[0].session == "replayed"
    assert LOG in files(engine, "a")


def test_one_tenant_cannot_flush_another(model, tmp_path, sizes):
    log, state = sizes
    engine = new_engine(model, session_dir=str(tmp_path), session_disk_size=16 * log + 3 * state, max_model_len=512)
    ask(engine, "first", tenant="small")
    rest(engine)
    for number in range(6):
        ask(engine, f"s{number}", tenant="large")
        rest(engine)
    assert STATE in files(engine, "first", "small")
    assert ask(engine, "first", tenant="small", turn=1)[0].session == "restored"


def test_what_a_request_waits_for_stays(model, tmp_path, sizes):
    log, state = sizes
    engine = filled(model, tmp_path, "abc", size=3 * log + 3 * state + 20_000)
    engine.sessions.get(("tenant", "a")).wanted = True
    assert engine.mover.files.budget.has_room(state)
    run_until_idle(engine)
    assert [STATE in files(engine, name) for name in "abc"] == [True, False, True]


def test_another_running_server_keeps_its_sessions(model, tmp_path):
    other = filled(model, tmp_path, "ab")
    disk = Disk(tmp_path)
    disk.drop(("tenant", "a"), LOG, STATE)
    assert files(other, "a") == {LOG, STATE}
    engine = new_engine(model, session_dir=str(tmp_path))
    assert engine.mover.files.usage.bytes == 0
    assert ask(engine, "a", turn=1)[0].session == "restored"
    assert engine.mover.files.usage.bytes == disk.sizes(("tenant", "a")).all


def test_a_budget_that_holds_no_log_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="at least") as caught:
        new_engine(model, session_dir=str(tmp_path), session_disk_size=1000)
    assert caught.value.param == "session_disk_size"
    with pytest.raises(ConfigError, match="session_dir"):
        new_engine(model, session_disk_size=2**30)


def test_metrics_name_the_budget(model, tmp_path, sizes):
    log, _ = sizes
    engine = filled(model, tmp_path, "abc", size=3 * log)
    registry = Metrics(EngineThread(engine, lambda events: None), "m").registry
    value = registry.get_sample_value
    assert value("pacellm_session_disk_size_bytes", {"model_name": "m"}) == 3 * log
    assert value("pacellm_session_files_dropped_total", {"model_name": "m", "kind": "log"}) == 0
    disk = {"model_name": "m", "tier": "disk", "kind": "log"}
    assert value("pacellm_session_bytes", disk) == engine.mover.files.usage.log_bytes > 0
