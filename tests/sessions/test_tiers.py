"""Sessions below the device: host memory, disk, restarts. Whatever tier they went through, the same bits."""

import threading

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.errors import ConfigError, SessionConflict, SessionDeleted, SessionNotFound
from pacellm.model.load import prepare
from pacellm.sessions.disk import LOG, STATE
from pacellm.types import Failed
from tests.engine.helpers import (
    assert_nothing_held,
    assert_same_banks,
    banks,
    crash,
    finish,
    new_engine,
    operate,
    prompt,
    request,
    run,
    tokens,
)
from tests.models import tiny

KEY = ("tenant", "s")
FIRST, MORE = prompt(700, 1), [prompt(60, 2), prompt(90, 3), prompt(80, 4)]


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("smollm3"))


def turns(engine, names="0123", between=lambda engine: engine):
    """A conversation in one session; ``between`` is called after each turn and may give another engine."""
    history, answers, ends = list(FIRST), [], []
    for number, name in enumerate(names):
        events = run(engine, request(name, history, session="s"))[name]
        ends.append(finish(events))
        answers.append(tokens(events))
        history += tokens(events) + MORE[number % 3]
        run_until_idle(engine)
        last = engine
        engine = between(engine)
    return answers, ends, last


@pytest.fixture(scope="module")
def wanted(model):
    answers, _, engine = turns(new_engine(model))
    return answers, banks(engine, "s")


def evict(engine):
    assert engine.eviction.evict_one()
    run_until_idle(engine)
    return engine


def disk_engine(model, path, **changes):
    return new_engine(model, session_dir=str(path), **changes)


def test_through_host_memory(model, wanted):
    engine = new_engine(model, session_host_memory=2**24, max_num_batched_tokens=100)
    answers, ends, _ = turns(engine, between=evict)
    assert answers == wanted[0]
    assert [end.session for end in ends] == ["new", "restored", "restored", "restored"]
    assert all(end.usage.cached_tokens > 700 for end in ends[1:])
    assert engine.sessions.get(KEY).tier == "host"
    assert engine.sessions.kv_bytes == engine.sessions.bank_bytes == 0
    state = engine.sessions.get(KEY).host
    assert engine.mover.host.bytes == state.nbytes > 700 * model.bytes_per_token
    found = {
        (layer, name): tensor
        for layer, bank in state.banks.items()
        for name, tensor in zip(bank._fields, bank, strict=True)
    }
    assert_same_banks(found, wanted[1])
    assert_nothing_held(engine)


def test_through_disk(model, wanted, tmp_path):
    engine = disk_engine(model, tmp_path)
    answers, ends, _ = turns(engine, between=evict)
    assert answers == wanted[0]
    assert [end.session for end in ends] == ["new", "restored", "restored", "restored"]
    assert engine.sessions.get(KEY).tier == "disk"
    folder = engine.mover.disk.folder(KEY)
    assert {path.name for path in folder.iterdir()} == {"lock", "owner.json", LOG, STATE}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "tenant" not in folder.name
    assert_nothing_held(engine)


def test_over_restarts(model, wanted, tmp_path):
    def restart(engine):
        engine.close()
        return disk_engine(model, tmp_path, max_num_batched_tokens=111)

    answers, ends, _ = turns(disk_engine(model, tmp_path), between=restart)
    assert answers == wanted[0]
    assert [end.session for end in ends] == ["new", "restored", "restored", "restored"]


def test_a_restart_without_a_close_loses_nothing_that_was_synced(model, wanted, tmp_path):
    def begin_again(engine):
        crash(engine)
        return disk_engine(model, tmp_path, session_sync=True)

    answers, ends, _ = turns(disk_engine(model, tmp_path, session_sync=True), between=begin_again)
    assert answers == wanted[0]
    assert [end.session for end in ends] == ["new", "replayed", "replayed", "replayed"]


def test_what_was_not_synced_is_said(model, tmp_path):
    engine = disk_engine(model, tmp_path)
    run(engine, request("1", FIRST, session="s"))
    evict(engine)
    run(engine, request("2", FIRST + MORE[0], session="s"))
    crash(engine)
    engine = disk_engine(model, tmp_path)
    end = finish(run(engine, request("3", FIRST + MORE[0], session="s"))["3"])
    assert end.session == "replayed"
    assert "1 later commit" in end.note
    engine = disk_engine(model, tmp_path / "other")
    run(engine, request("1", FIRST, session="s"))
    crash(engine)
    end = finish(run(disk_engine(model, tmp_path / "other"), request("2", FIRST, session="s"))["2"])
    assert (end.session, end.note) == ("lost", "the session's log was never written")


def test_host_memory_overflows_to_disk(model, wanted, tmp_path):
    engine = disk_engine(model, tmp_path, session_host_memory=700_000)
    answers, _, _ = turns(engine, between=evict)
    assert engine.sessions.get(KEY).tier == "host"
    for name in "abc":
        run(engine, request(name, FIRST, session=name))
        evict(engine)
        assert engine.mover.host.bytes <= 700_000
    assert engine.sessions.get(KEY).tier == "disk"
    assert finish(run(engine, request("x", FIRST, session="s"))["x"]).session == "restored"
    assert answers == wanted[0]


def test_logs_go_to_disk_and_come_back(model, tmp_path):
    engine = disk_engine(model, tmp_path, session_log_memory=6000)
    for name in "abcdef":
        run(engine, request(name, FIRST, session=name))
        run_until_idle(engine)
    run(engine, request("g", MORE[0]))
    run_until_idle(engine)
    assert engine.sessions.log_bytes <= 6000
    stub = engine.sessions.get(("tenant", "a"))
    assert (stub.stub, stub.tier, stub.num_tokens) == (True, "disk", 709)
    assert finish(run(engine, request("x", FIRST, session="a"))["x"]).session == "restored"
    assert engine.sessions.losses == 0


@pytest.mark.parametrize("tier", ["device", "host", "disk", "stub"])
def test_delete(model, tmp_path, tier):
    engine = disk_engine(model, tmp_path, session_host_memory=2**24 if tier == "host" else 0)
    free = engine.allocator.num_free, engine.pool.num_free
    run(engine, request("1", FIRST, session="s"))
    if tier != "device":
        assert engine.eviction.evict_one()  # a spill on its way does not bring it back
    if tier == "stub":
        engine.close()
        engine = disk_engine(model, tmp_path)
    assert operate(engine, engine.ops.delete(KEY))["deleted"]
    assert (engine.allocator.num_free, engine.pool.num_free) == free
    assert engine.mover.host.bytes == 0
    assert sorted(path.name for path in engine.mover.disk.folder(KEY).iterdir()) == ["lock", "owner.json"]
    for key in (KEY, ("other", "s")):
        with pytest.raises(SessionNotFound):
            operate(engine, engine.ops.delete(key))
    engine.close()
    engine = disk_engine(model, tmp_path)
    assert finish(run(engine, request("2", FIRST, session="s"))["2"]).session == "new"
    engine.close()
    engine = disk_engine(model, tmp_path)
    assert finish(run(engine, request("3", FIRST, session="s"))["3"]).session == "restored"


@pytest.mark.parametrize("with_disk", [False, True])
def test_delete_while_in_use(model, tmp_path, with_disk):
    engine = disk_engine(model, tmp_path) if with_disk else new_engine(model)
    run(engine, request("1", FIRST, session="s"))
    free = engine.allocator.num_blocks, engine.pool.num_rows
    engine.add(request("2", FIRST + MORE[0], session="s"))
    engine.add(request("3", FIRST, session="s"))
    while not engine.scheduler.running:
        engine.step()
    future = engine.call(engine.ops.delete(KEY))
    events = run_until_idle(engine)
    assert future.result(1)["deleted"]
    for name in "23":
        assert isinstance(events[name][-1], Failed)
        assert isinstance(events[name][-1].error, SessionDeleted)
    assert (engine.allocator.num_free, engine.pool.num_free) == free
    assert_nothing_held(engine)
    assert finish(run(engine, request("4", FIRST, session="s"))["4"]).session == "new"


def test_a_shared_directory_refuses_the_stale_owner(model, tmp_path):
    one, two = (disk_engine(model, tmp_path, session_sync=True) for _ in range(2))
    history = FIRST + tokens(run(one, request("1", FIRST, session="s"))["1"]) + MORE[0]
    kept = new_engine(model)
    run(kept, request("1", FIRST, session="s"))
    wanted = tokens(run(kept, request("2", history, session="s"))["2"])
    one.add(request("stale", history, session="s"))
    while not one.scheduler.running:
        one.step()
    second = run(two, request("2", history, session="s"))["2"]
    assert (finish(second).session, tokens(second)) == ("replayed", wanted)
    stale = run_until_idle(one)["stale"][-1]
    assert isinstance(stale.error, SessionConflict)
    assert stale.error.status == 409
    assert_nothing_held(one)
    # sent again, it goes on from what the other server wrote
    history += wanted + MORE[1]
    wanted = tokens(run(kept, request("3", history, session="s"))["3"])
    third = run(one, request("3", history, session="s"))["3"]
    assert (finish(third).session, tokens(third)) == ("replayed", wanted)
    assert_same_banks(banks(one, "s"), banks(kept, "s"))


def test_a_living_owner_with_unwritten_commits_is_not_robbed(model, tmp_path):
    one, two = disk_engine(model, tmp_path), disk_engine(model, tmp_path)
    run(one, request("1", FIRST, session="s"))
    error = run(two, request("2", FIRST, session="s"))["2"][-1].error
    assert isinstance(error, SessionConflict)
    evict(one)
    assert finish(run(two, request("3", FIRST, session="s"))["3"]).session == "restored"


def test_a_delete_elsewhere_reaches_the_old_owner(model, tmp_path):
    one, two = (disk_engine(model, tmp_path, session_sync=True) for _ in range(2))
    run(one, request("1", FIRST, session="s"))
    assert operate(two, two.ops.delete(KEY))["deleted"]
    assert finish(run(one, request("2", FIRST, session="s"))["2"]).session == "new"
    with pytest.raises(SessionNotFound):
        operate(one, one.ops.show(("tenant", "never")))


def test_decoding_goes_on_while_a_session_is_moved(model, tmp_path, monkeypatch):
    engine = disk_engine(model, tmp_path)
    run(engine, request("1", FIRST, session="s"))
    evict(engine)
    gate = threading.Event()
    original = engine.mover.files.records.fill

    def slow(*arguments):
        gate.wait(30)
        original(*arguments)

    monkeypatch.setattr(engine.mover.files.records, "fill", slow)
    from pacellm.types import SamplingParams

    engine.add(request("stream", MORE[0], SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)))
    engine.add(request("2", FIRST, session="s"))
    finished = []
    while "stream" not in finished:
        finished += [name for name, event in engine.step() if type(event).__name__ == "Finished"]
    assert finished == ["stream"]
    gate.set()
    assert finish(run_until_idle(engine)["2"]).session == "restored"


def test_one_tenant_cannot_flush_another(model):
    engine = new_engine(model, session_memory=8 * 512 * model.bytes_per_token)
    from pacellm.types import GenerationRequest

    def ask(tenant, name):
        engine.add(GenerationRequest(f"{tenant}{name}", FIRST, request("x", []).sampling, session=(tenant, name)))
        run_until_idle(engine)

    ask("small", "kept")
    for number in range(12):
        ask("large", str(number))
    assert engine.sessions.get(("small", "kept")).is_resident
    assert sum(engine.sessions.get(("large", str(n))).is_resident for n in range(12)) == 3


def test_ttl(model, tmp_path, monkeypatch):
    engine = disk_engine(model, tmp_path, session_ttl=100.0)
    run(engine, request("1", FIRST, session="s"))
    session = engine.sessions.get(KEY)
    session.last_used -= 101
    engine.sessions._next_expiry = 0
    engine.step()
    run_until_idle(engine)
    assert engine.sessions.get(KEY) is None
    engine.close()
    engine = disk_engine(model, tmp_path)
    assert finish(run(engine, request("2", FIRST, session="s"))["2"]).session == "lost"


def test_fork_shares_full_blocks_and_copies_the_rest(model, wanted):
    engine = new_engine(model)
    first = run(engine, request("1", FIRST, session="s"))["1"]
    free = engine.allocator.num_free, engine.pool.num_free
    made = operate(engine, engine.ops.fork(KEY, ("tenant", "t"), None))
    assert free == (engine.allocator.num_free + 1, engine.pool.num_free + 1)
    assert made["bytes_added"] == {"kv": engine.block_bytes, "bank": engine.pool.bytes_per_row}
    assert made["tier"] == "device"
    assert_same_banks(banks(engine, "s"), banks(engine, "t"))
    history = FIRST + tokens(first) + MORE[0]
    other = run(engine, request("o", FIRST + MORE[2], session="t"))["o"]
    assert finish(other).session == "resident"
    assert finish(other).usage.cached_tokens == 700
    answer = run(engine, request("2", history, session="s"))["2"]
    assert tokens(answer) == wanted[0][1]
    assert_nothing_held(engine)
    run(engine, request("r", FIRST, session="r"))
    engine.eviction.evict(engine.sessions.get(("tenant", "t")))
    assert finish(run(engine, request("o2", FIRST + MORE[2], session="t"))["o2"]).session == "replayed"


@pytest.mark.parametrize("host", [None, 2**24])
def test_a_fork_whose_source_gives_way_to_it(model, wanted, host):
    """Where nothing else can, the fork is its log alone."""
    engine = new_engine(model, kv_cache_memory=2 * 512 * model.bytes_per_token, session_host_memory=host)
    first = run(engine, request("1", FIRST, session="s"))["1"]
    assert engine.allocator.num_free == 0
    made = operate(engine, engine.ops.fork(KEY, ("tenant", "t"), None))
    assert made["tier"] == "log"
    other = run(engine, request("o", FIRST + tokens(first) + MORE[0], session="t"))["o"]
    assert finish(other).session == "replayed"
    assert tokens(other) == wanted[0][1]
    assert_nothing_held(engine)


def test_reset(model, tmp_path):
    engine = disk_engine(model, tmp_path)
    one = tokens(run(engine, request("1", FIRST, session="s"))["1"])
    evict(engine)
    shown = operate(engine, engine.ops.reset(KEY))
    assert (shown["tokens"], shown["commits"]) == (0, 0)
    engine.close()
    engine = disk_engine(model, tmp_path)
    again = run(engine, request("2", FIRST, session="s"))["2"]
    assert (finish(again).session, tokens(again)) == ("new", one)


def test_pa_memory_is_a_budget(model):
    each = new_engine(model).pool.bytes_per_row
    engine = new_engine(model, pa_memory=18 * each, max_num_seqs=16)
    assert engine.pool.num_rows == 18
    for name in "abc":
        run(engine, request(name, MORE[0], session=name))
    assert [engine.sessions.get(("tenant", name)).is_resident for name in "abc"] == [False, True, True]
    with pytest.raises(ConfigError, match="at least"):
        new_engine(model, pa_memory=16 * each, max_num_seqs=16)


def test_a_delete_while_the_disk_is_being_asked(model, tmp_path):
    engine = disk_engine(model, tmp_path)
    run(engine, request("1", FIRST, session="s"))
    engine.close()
    engine = disk_engine(model, tmp_path)
    engine.add(request("2", FIRST, session="s"))
    engine.scheduler.schedule()
    assert engine.mover.claims.is_asking(KEY)
    future = engine.call(engine.ops.delete(KEY))
    events = run_until_idle(engine)
    assert isinstance(events["2"][-1].error, SessionDeleted)
    assert future.result(1)["deleted"]
    assert finish(run(engine, request("3", FIRST, session="s"))["3"]).session == "new"


def test_a_fork_onto_a_deleted_name_lives(model, tmp_path):
    engine = disk_engine(model, tmp_path)
    run(engine, request("1", FIRST, session="s"))
    run(engine, request("2", FIRST, session="t"))
    operate(engine, engine.ops.delete(("tenant", "t")))
    operate(engine, engine.ops.fork(KEY, ("tenant", "t"), None))
    assert finish(run(engine, request("3", FIRST + MORE[0], session="t"))["3"]).session == "resident"
    engine.close()
    engine = disk_engine(model, tmp_path)
    assert finish(run(engine, request("4", FIRST, session="t"))["4"]).session == "restored"
