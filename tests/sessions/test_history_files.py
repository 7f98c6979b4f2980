"""Sessions longer than their budget below the device: block by block in host memory and in files, to the same bit."""

import errno
import itertools
import os

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from pacellm.sessions import history_files
from pacellm.sessions.disk import LOG, STATE
from tests.engine.helpers import assert_nothing_held, crash, finish, operate, prompt, request
from tests.models import tiny
from tests.sessions.broken_disk import full_disk
from tests.sessions.failing_disk import FailingDisk
from tests.sessions.long_sessions import (
    KEY,
    LONG,
    READ,
    assert_counted,
    blocks,
    files,
    new,
    questions,
    spill,
    turn,
    unlisted,
)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("smollm3"))


@pytest.fixture(scope="module")
def block_bytes(model):
    return 512 * model.bytes_per_token


@pytest.fixture(scope="module")
def wanted(model):
    found, _, engine = questions(new(model), lambda engine: engine)
    return found, engine.sessions.get(KEY).history.tokens


# -- restarts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True])
def test_restarts_without_a_replay(model, wanted, tmp_path, sync):
    def restart(engine):
        engine.close()
        return new(model, tmp_path, session_sync=sync, max_num_batched_tokens=700)

    found, ends, engine = questions(new(model, tmp_path, session_sync=sync), restart)
    assert found == wanted[0]
    assert [(end.session, end.usage.replayed_tokens) for end in ends] == [("restored", 0)] * 3
    session = engine.sessions.get(KEY)
    assert session.history.tokens == wanted[1]
    assert session.history.host_bytes < wanted[1] * model.bytes_per_token, "most are maps"
    assert_nothing_held(engine)
    engine.close()
    assert not unlisted(tmp_path)


def test_through_the_disk_only_what_is_new_is_written(model, wanted, tmp_path):
    inodes = []

    def through(engine):
        spill(engine)
        assert engine.sessions.get(KEY).tier == "disk"
        assert engine.mover.host.bytes == 0
        inodes.append({name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in blocks(engine).items()})
        assert_counted(engine, tmp_path)
        return engine

    found, ends, engine = questions(new(model, tmp_path, session_host_memory=0), through)
    assert found == wanted[0]
    assert [end.session for end in ends] == ["restored"] * 3
    through(engine)
    assert len(inodes[0]) < len(inodes[-1]) == wanted[1] // 512
    for before, after in itertools.pairwise(inodes):
        assert before.items() <= after.items()


def test_through_host_memory_and_then_to_disk(model, wanted, tmp_path, block_bytes):
    def through(engine):
        spill(engine)
        assert engine.sessions.get(KEY).tier == "host"
        engine.mover._leave_host(engine.sessions.get(KEY))
        run_until_idle(engine)
        assert engine.mover.host.bytes == 0
        return engine

    found, ends, _ = questions(new(model, tmp_path, session_host_memory=64 * block_bytes), through)
    assert found == wanted[0]
    assert [end.session for end in ends] == ["restored"] * 3


# -- host memory that is short -----------------------------------------------------------------------------


@pytest.mark.parametrize("room", [5, 8])
def test_blocks_leave_host_memory_while_a_prompt_is_read(model, wanted, tmp_path, block_bytes, room):
    engine = new(model, tmp_path, session_host_memory=room * block_bytes)
    most = []
    saved = engine.parts.scheduling.cache.views._save
    engine.parts.scheduling.cache.views._save = lambda block: (saved(block), most.append(engine.mover.host.bytes))[0]
    found, ends, engine = questions(engine, lambda engine: engine)
    assert found == wanted[0]
    assert [end.usage.replayed_tokens for end in ends] == [0, 0, 0]
    assert max(most) <= room * block_bytes
    assert unlisted(tmp_path)
    assert_counted(engine, tmp_path)
    assert operate(engine, engine.ops.delete(KEY))["deleted"]
    engine.prefix_cache.clear()
    for _ in range(2):
        engine.step()
        engine.worker.finish()
    assert not unlisted(tmp_path)
    assert engine.mover.files.usage.bytes == engine.mover.host.bytes == 0


def test_idle_sessions_share_little_host_memory_and_none_is_replayed(model, tmp_path, block_bytes):
    engine = new(model, tmp_path, session_host_memory=4 * block_bytes)
    first = {}
    for number in range(3):
        for name in "abc":
            answer, end = turn(engine, [*prompt(4700, ord(name)), *prompt(40, 9)], session=name, commit=not number)
            assert answer == first.setdefault(name, answer)
            assert engine.mover.host.bytes <= 4 * block_bytes
            assert end.usage.replayed_tokens == 0
            assert end.session == ("resident" if number else "new")
    assert_counted(engine, tmp_path)


def test_what_fits_neither_host_memory_nor_disk_is_refused(model, tmp_path, block_bytes):
    engine = new(model, tmp_path, session_host_memory=3 * block_bytes, session_disk_size=4 * block_bytes)
    for name, length in (("long", 6000), ("short", 3000)):
        engine.add(request(name, prompt(length), READ))
    events = run_until_idle(engine)
    assert "on disk" in str(events["long"][-1].error)
    assert events["long"][-1].error.code == "context_length_exceeded"
    assert finish(events["short"])
    assert engine.mover.files.usage.bytes <= 4 * block_bytes


def test_a_disk_budget_drops_old_histories_and_then_replays_them(model, wanted, tmp_path, block_bytes):
    engine = new(model, tmp_path, session_host_memory=0, session_disk_size=16 * block_bytes)
    turn(engine, LONG, READ)
    spill(engine)
    assert blocks(engine)
    turn(engine, prompt(4700, 7), READ, session="other")
    spill(engine)
    assert blocks(engine, "other")
    assert not blocks(engine)
    assert engine.mover.files.usage.bytes <= 16 * block_bytes
    assert_counted(engine, tmp_path)
    answer, end = turn(engine, [*LONG, *prompt(200, 1)])
    assert (answer, end.session) == (wanted[0][0], "replayed")


def test_memory_lets_go_of_files_that_gave_way(model, wanted, tmp_path, block_bytes):
    """A session that was brought back has maps of its files: the disk has their room when it holds them no more."""
    engine = new(model, tmp_path, session_host_memory=0, session_disk_size=16 * block_bytes)
    turn(engine, LONG, READ)
    spill(engine)
    turn(engine, [*LONG, *prompt(200, 1)], commit=False)
    engine.prefix_cache.clear()
    session = engine.sessions.get(KEY)
    assert session.maps_files
    assert not engine.mover.files.budget.has_room(16 * block_bytes)
    assert engine.mover.files.budget.has_room(15 * block_bytes)
    assert session.maps_files, "not before the step ends"
    run_until_idle(engine)
    engine.step()
    assert not session.history.blocks
    assert not blocks(engine)
    answer, end = turn(engine, [*LONG, *prompt(200, 1)])
    assert (answer, end.session) == (wanted[0][0], "replayed")


def test_no_log_gives_way_to_a_history(model, tmp_path, block_bytes):
    engine = new(model, tmp_path, session_host_memory=0, session_disk_size=16 * block_bytes)
    turn(engine, LONG, READ)
    assert unlisted(tmp_path)
    engine.prefix_cache.clear()
    engine.mover.files.budget.limit = 20_000
    turn(engine, prompt(20), READ, session="other")
    engine.step()
    engine.worker.finish()
    assert engine.mover.files.budget.logs_dropped == 0
    assert not unlisted(tmp_path)
    assert {session.key[1] for session in engine.sessions} == {"s", "other"}


# -- forks, and what goes ----------------------------------------------------------------------------------


def test_forks_link_their_blocks(model, wanted, tmp_path):
    engine = new(model, tmp_path, session_host_memory=0)
    turn(engine, LONG, READ)
    spill(engine)
    operate(engine, engine.ops.fork(KEY, ("tenant", "f"), None))
    spill(engine)
    mine, theirs = blocks(engine), blocks(engine, "f")
    assert mine.keys() == theirs.keys() != set()
    assert all(path.stat().st_ino == theirs[name].stat().st_ino for name, path in mine.items())
    assert_counted(engine, tmp_path)
    operate(engine, engine.ops.delete(KEY))
    assert sorted(files(engine)) == ["lock", "owner.json"]
    assert_counted(engine, tmp_path)
    answer, end = turn(engine, [*LONG, *prompt(200, 1)], session="f")
    assert (answer, end.session) == (wanted[0][0], "restored")


def test_a_fork_without_links_is_written(model, wanted, tmp_path, monkeypatch):
    engine = new(model, tmp_path, session_host_memory=0)
    turn(engine, LONG, READ)
    spill(engine)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(history_files.os, "link", refuse)
    operate(engine, engine.ops.fork(KEY, ("tenant", "f"), None))
    spill(engine)
    assert blocks(engine).keys() == blocks(engine, "f").keys() != set()
    answer, end = turn(engine, [*LONG, *prompt(200, 1)], session="f")
    assert (answer, end.session) == (wanted[0][0], "restored")


def test_a_map_outlives_its_file(model, wanted, tmp_path):
    """The source is deleted, with its files, while its fork reads them."""
    engine = new(model, tmp_path, session_host_memory=0)
    turn(engine, LONG, READ)
    spill(engine)
    operate(engine, engine.ops.fork(KEY, ("tenant", "f"), None))
    operate(engine, engine.ops.delete(KEY))
    context = [*LONG, *prompt(200, 1)]
    assert turn(engine, context, session="f")[0] == wanted[0][0]
    spill(engine)
    assert len(blocks(engine, "f")) >= 8
    assert turn(engine, context, session="f", commit=False)[1].session == "restored"


@pytest.mark.parametrize("what", ["reset", "delete"])
def test_nothing_is_left(model, tmp_path, what):
    engine = new(model, tmp_path, session_host_memory=0)
    turn(engine, LONG, READ)
    spill(engine)
    assert blocks(engine)
    operate(engine, getattr(engine.ops, what)(KEY))
    left = {"lock", "owner.json"} | ({LOG} if what == "reset" else set())
    assert files(engine).keys() == left
    assert engine.mover.files.usage.state_bytes == 0


def test_another_course_leaves_no_blocks_of_the_former(model, tmp_path):
    engine = new(model, tmp_path, session_host_memory=0)
    turn(engine, LONG, READ)
    spill(engine)
    former = set(blocks(engine))
    turn(engine, [*LONG[:1000], *prompt(4000, 5)], READ)
    spill(engine)
    kept = former & set(blocks(engine))
    assert len(kept) == 1, "the first 512 tokens are the same"
    assert turn(engine, [*LONG[:1000], *prompt(4000, 5)], READ, commit=False)[1].session == "restored"
    assert len(blocks(engine)) == engine.sessions.get(KEY).history.tokens // 512


# -- what is broken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped", "another", "short"])
def test_a_damaged_block_is_refused_and_the_log_replayed(model, wanted, tmp_path, damage):
    engine = new(model, tmp_path)
    turn(engine, LONG, READ)
    engine.close()
    engine = new(model, tmp_path)
    names = sorted(blocks(engine))
    path = blocks(engine)[names[2]]
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped":
        data[-9] ^= 4
    elif damage == "another":
        data = blocks(engine)[names[1]].read_bytes()
    elif damage == "short":
        data = data[:-100]
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else data)
    answer, end = turn(engine, [*LONG, *prompt(200, 1)])
    assert (answer, end.session) == (wanted[0][0], "replayed")
    assert "state.safetensors was refused: block" in end.note
    assert engine.mover.stats.refused == 1
    engine.close()
    engine = new(model, tmp_path)
    assert path.name not in blocks(engine), "the next state lists others"
    assert turn(engine, [*LONG, *prompt(200, 1)], commit=False)[1].session == "restored"


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_costs_the_state_alone(model, wanted, tmp_path, monkeypatch, after):
    engine = new(model, tmp_path, session_host_memory=0)
    turn(engine, LONG, READ)
    full_disk(monkeypatch, after)
    spill(engine)
    assert files(engine).keys() == {"lock", "owner.json"}, "what was written before takes no room"
    answer, end = turn(engine, [*LONG, *prompt(200, 1)])
    assert (answer, end.session) == (wanted[0][0], "replayed")


def test_a_log_is_written_where_its_history_cannot_be(model, wanted, tmp_path, monkeypatch):
    engine = new(model, tmp_path)
    turn(engine, LONG, READ)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(history_files, "publish", refuse)
    engine.close()
    assert engine.mover.stats.failures == 1
    assert files(engine).keys() == {"lock", "owner.json", LOG}
    answer, end = turn(new(model, tmp_path), [*LONG, *prompt(200, 1)])
    assert (answer, end.session, end.note) == (wanted[0][0], "replayed", None)


def test_blocks_that_the_disk_refuses_stay_in_memory(model, wanted, tmp_path, monkeypatch, block_bytes):
    engine = new(model, tmp_path, session_host_memory=4 * block_bytes)
    full_disk(monkeypatch)
    turn(engine, LONG, READ)
    assert engine.mover.stats.failures == 1
    assert not unlisted(tmp_path)
    assert engine.mover.host.history.bytes > 4 * block_bytes
    engine.add(request("other", prompt(4700, 5), READ))
    refused = run_until_idle(engine)["other"][-1].error
    assert refused.status == 500
    assert "the session directory, which cannot be written: No space left on device" in str(refused)
    monkeypatch.undo()
    engine.mover.histories._next_try = 0
    turn(engine, [*LONG, *prompt(1200, 1)], READ, commit=False)
    assert turn(engine, [*LONG, *prompt(200, 1)])[0] == wanted[0][0]
    assert engine.mover.host.history.bytes <= 4 * block_bytes


@pytest.mark.parametrize(
    "dies", [3, 30, ("replace", STATE + ".draft"), ("open", STATE + ".draft"), ("replace", "owner.json.draft")]
)
def test_a_kill_while_a_session_is_written(model, wanted, tmp_path, monkeypatch, dies):
    engine = new(model, tmp_path, session_sync=True)
    turn(engine, LONG, READ)
    spill(engine)
    disk = FailingDisk(tmp_path)
    disk.install(monkeypatch)
    disk.begin(None, dies)
    engine.mover._leave_host(engine.sessions.get(KEY))
    engine.worker.finish()
    assert disk.is_dead
    crash(engine)
    disk.calm()
    engine = new(model, tmp_path, session_sync=True)
    answer, end = turn(engine, [*LONG, *prompt(200, 1)])
    assert (answer, end.session) == (wanted[0][0], "replayed")
    engine.close()
    engine = new(model, tmp_path)
    assert turn(engine, [*LONG, *prompt(200, 1)], commit=False)[1].session == "restored"
    assert len(blocks(engine)) == engine.sessions.get(KEY).history.tokens // 512
    assert not list(tmp_path.rglob("*.draft"))


def test_a_dead_servers_blocks_go(model, tmp_path, block_bytes):
    engine = new(model, tmp_path, session_host_memory=3 * block_bytes)
    turn(engine, LONG, READ)
    assert unlisted(tmp_path)
    other = new(model, tmp_path)
    assert unlisted(tmp_path), "it lives"
    crash(engine)
    other.close()
    new(model, tmp_path)
    assert not unlisted(tmp_path)


def test_descriptors_are_not_held(model, tmp_path):
    engine = new(model, tmp_path, session_host_memory=0)
    turn(engine, LONG, READ)
    spill(engine)
    before = len(os.listdir("/proc/self/fd"))
    turn(engine, [*LONG, *prompt(200, 1)])
    assert engine.sessions.get(KEY).maps_files
    assert len(os.listdir("/proc/self/fd")) == before
