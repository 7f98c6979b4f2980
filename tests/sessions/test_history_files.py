"""Sessions longer than their budget below the device: block by block in host memory and in files, to the same bit."""

import collections
import dataclasses
import errno
import itertools
import os
import random

import pytest

from pacellm import PAConfig
from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from pacellm.sessions import history_files
from pacellm.sessions.disk import LOG, STATE
from pacellm.types import Delta, Outline, SamplingParams
from tests.engine.helpers import assert_nothing_held, crash, finish, new_engine, operate, prompt, request
from tests.models import tiny
from tests.sessions.broken_disk import full_disk
from tests.sessions.failing_disk import CALLS, FailingDisk

SIZES = {
    "working_memory": 2560,
    "working_memory_window": 512,
    "working_memory_recall": 1024,
    "max_model_len": 50_000,
    "bank": PAConfig(bank_size=12, segment=64),
}
READ = SamplingParams(max_tokens=0)
ANSWER = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=0)
KEY = ("tenant", "s")
LONG = prompt(4700)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("smollm3"))


@pytest.fixture(scope="module")
def block_bytes(model):
    return 512 * model.bytes_per_token


def new(model, path=None, **changes):
    return new_engine(model, **{**SIZES, **({"session_dir": str(path)} if path else {}), **changes})


def turn(engine, ids, sampling=ANSWER, session="s", **changes):
    """A request's tokens with log-probabilities, and its end."""
    asked = request("x", ids, sampling, session=session, **changes)
    engine.add(dataclasses.replace(asked, outline=Outline(opening=3, question=(20, 5))))
    events = run_until_idle(engine)["x"]
    found = [(one.token_id, one.logprob) for e in events if isinstance(e, Delta) for one in e.logprobs]
    return found, finish(events)


def questions(engine, between, session="s", ids=LONG):
    """Reads beyond the budget, then asks three times; ``between`` gives the engine that goes on."""
    context, found, ends = list(ids), [], []
    turn(engine, context, READ, session)
    for number in range(3):
        engine = between(engine)
        context += prompt(200 + 301 * number, number + 1)
        answer, end = turn(engine, context, ANSWER, session)
        context += [token for token, _ in answer][:-1]
        found.append(answer)
        ends.append(end)
    return found, ends, engine


@pytest.fixture(scope="module")
def wanted(model):
    found, _, engine = questions(new(model), lambda engine: engine)
    return found, engine.sessions.get(KEY).history.tokens


def spill(engine):
    """Everything idle leaves the device."""
    engine.prefix_cache.clear()
    while engine.eviction.evict_one():
        pass
    run_until_idle(engine)
    return engine


def files(engine, name="s"):
    return {path.name: path for path in engine.mover.disk.folder(("tenant", name)).iterdir()}


def blocks(engine, name="s"):
    return {file: path for file, path in files(engine, name).items() if file.startswith("history.")}


def unlisted(path):
    return list(path.glob("history/*/*"))


def assert_counted(engine, path):
    """What the directory holds is what is said of it, but for the heads of files that no state lists, and owners."""
    engine.worker.finish()
    held, spare = engine.mover.files.usage, 4096 * len(unlisted(path))
    found = {one.stat().st_ino: one for one in path.rglob("*.safetensors")}
    of_blocks = [one for one in found.values() if "history" in f"{one.parent.parent.name} {one.name}"]
    owners = sum(one.stat().st_size for one in path.glob("*/owner.json"))
    for told, files, more in ((held.bytes, found.values(), owners), (held.history_bytes, of_blocks, 0)):
        size = sum(one.stat().st_size for one in files)
        assert size - spare <= told <= size + more


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


class Schedule:
    """Sessions that grow, ask, fork, go back and end, in any order, over little memory and a small disk; every answer
    is that of an engine that nothing ever leaves."""

    def __init__(self, model, path, seed, **settings):
        self.model, self.path, self.settings, self.rng = model, path, settings, random.Random(seed)
        self.engine, self.alone = new(model, path, **settings), new(model)
        self.contexts = {}
        self.found = collections.Counter()

    def run(self, length):
        for _ in range(length):
            kinds = ["ask", "ask", "ask", "peek", "spill", "fork", "delete", "reset", "restart"]
            getattr(self, self.rng.choice(kinds))()
            budget = self.engine.mover.files.budget
            self.engine.step()
            self.engine.worker.finish()
            assert budget.limit is None or budget._usage.bytes <= budget.limit
            assert_counted(self.engine, self.path)
        self.engine.close()
        assert not unlisted(self.path)

    def ask(self, *, commit=True):
        name = self.rng.choice("abc")
        former = self.contexts.get(name, [])
        kept = former if self.rng.random() < 0.7 else former[: self.rng.randrange(len(former) + 1)]
        length = self.rng.choice([30, 700, 2900]) if len(kept) < 6000 else 30
        context = [*kept, *prompt(length, self.rng.randrange(1000))]
        answer, end = turn(self.engine, context, session=name, commit=commit)
        wanted, _ = turn(self.alone, context, session=name, commit=commit)
        assert answer == wanted
        self.found[end.session] += 1
        if commit:
            self.contexts[name] = [*context, *(token for token, _ in answer[:-1])]

    def peek(self):
        self.ask(commit=False)

    def spill(self):
        spill(self.engine)

    def restart(self):
        self.engine.close()
        self.engine = new(self.model, self.path, **self.settings)

    def fork(self):
        source, target = self.rng.sample("abc", 2)
        if source in self.contexts and target not in self.contexts:
            self.both(lambda ops: ops.fork(("tenant", source), ("tenant", target), None))
            self.contexts[target] = list(self.contexts[source])

    def delete(self):
        self.end("delete")

    def reset(self):
        self.end("reset")

    def end(self, how):
        name = self.rng.choice("abc")
        if name in self.contexts:
            self.both(lambda ops: getattr(ops, how)(("tenant", name)))
            if how == "delete":
                del self.contexts[name]
            else:
                self.contexts[name] = []

    def fault(self, disk):
        """What is asked for from here on fails somewhere, or nothing does."""
        kind = self.rng.choice(["none", "full", "call", "number"])
        fails = {"none": None, "full": "full", "call": self.rng.choice(CALLS), "number": self.rng.randrange(40)}[kind]
        disk.begin(fails, None, self.rng.choice([errno.ENOSPC, errno.EIO]))
        self.engine.mover.histories._next_try = 0

    def both(self, make):
        for engine in (self.engine, self.alone):
            operate(engine, make(engine.ops))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_random_schedules(model, tmp_path, block_bytes, seed):
    settings = {"session_host_memory": (0, 5, 9)[seed % 3] * block_bytes}
    if seed % 2:
        settings["session_disk_size"] = 30 * block_bytes
    schedule = Schedule(model, tmp_path, seed, **settings)
    schedule.run(25)
    assert schedule.found["restored"]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_no_request_fails_for_a_disk_that_does(model, tmp_path, monkeypatch, block_bytes, seed):
    schedule = Schedule(model, tmp_path, seed, session_host_memory=(30, 12)[seed % 2] * block_bytes)
    disk = FailingDisk(tmp_path)
    disk.install(monkeypatch)
    for _ in range(25):
        schedule.fault(disk)
        getattr(schedule, schedule.rng.choice(["ask", "ask", "peek", "spill"]))()
        if schedule.rng.random() < 0.1:
            disk.calm()
            schedule.restart()
    disk.calm()
    schedule.spill()
    assert_nothing_held(schedule.engine)


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
    engine = new(model, tmp_path, session_host_memory=14 * block_bytes)
    monkeypatch.setattr(engine.scheduler.admission, "_has_history_room", lambda *_: True)
    engine.mover.host.capacity = 4 * block_bytes
    full_disk(monkeypatch)
    turn(engine, LONG, READ)
    assert engine.mover.stats.failures == 1
    assert not unlisted(tmp_path)
    assert engine.mover.host.history.bytes > 4 * block_bytes
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
