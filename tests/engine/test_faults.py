"""Disks that fail, files that are damaged, processes that die: nothing corrupt is served, and the server starts."""

import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from pacellm.engine.engine import run_until_idle
from pacellm.engine.sizing import memory_left
from pacellm.errors import ConfigError, SnapshotRefused
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
from tests.sessions.broken_disk import FIRST, KEY, MORE, full_disk, second_turn


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


@pytest.fixture(scope="module")
def wanted(model):
    return second_turn(model)


def stored(model, path, **changes):
    """A directory with one session at rest in it."""
    engine = new_engine(model, session_dir=str(path), **changes)
    run(engine, request("1", FIRST, session="s"))
    engine.close()
    return engine.mover.disk.folder(KEY)


def follow_up(model, path, wanted):
    """What a new engine on the directory answers; it must be right unless it says that the log is lost."""
    engine = new_engine(model, session_dir=str(path))
    end = run(engine, request("2", wanted[0], session="s"))["2"]
    if finish(end).session != "lost":
        assert tokens(end) == wanted[1]
        assert_same_banks(banks(engine, "s"), wanted[2])
    assert_nothing_held(engine)
    crash(engine)
    return finish(end)


def test_a_full_disk_costs_the_cache_not_the_session(model, wanted, tmp_path, monkeypatch):
    engine = new_engine(model, session_dir=str(tmp_path))
    run(engine, request("1", FIRST, session="s"))
    full_disk(monkeypatch)
    assert engine.eviction.evict_one()
    run_until_idle(engine)
    assert engine.mover.stats.failures == 1
    assert [path.name for path in engine.mover.disk.folder(KEY).iterdir() if "draft" in path.name] == []
    events = run(engine, request("2", wanted[0], session="s"))["2"]
    assert (finish(events).session, tokens(events)) == ("replayed", wanted[1])
    engine.close()  # says so in the log, and ends
    assert_nothing_held(engine)


def test_a_full_disk_fails_a_synced_commit_and_leaves_the_session_as_it_was(model, wanted, tmp_path, monkeypatch):
    engine = new_engine(model, session_dir=str(tmp_path), session_sync=True)
    run(engine, request("1", FIRST, session="s"))
    with monkeypatch.context() as patch:
        full_disk(patch)
        failed = run(engine, request("x", wanted[0], session="s"))["x"][-1]
    assert isinstance(failed, Failed)
    assert "could not be written" in str(failed.error)
    events = run(engine, request("2", wanted[0], session="s"))["2"]
    assert (finish(events).session, tokens(events)) == ("resident", wanted[1])
    assert_same_banks(banks(engine, "s"), wanted[2])
    assert_nothing_held(engine)


def test_folders_that_cannot_be_used(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", "/proc/nowhere"):
        with pytest.raises(ConfigError, match="cannot be used") as caught:
            new_engine(model, session_dir=str(path))
        assert caught.value.param == "session_dir"


def mutate(data, rng):
    """Damaged bytes: cut, flipped, zeroed, grown, with a huge header, or with a header that lies."""
    kind = rng.randrange(8)
    data = bytearray(data)
    place = rng.randrange(len(data))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == 3:
        data[place:place] = rng.randbytes(rng.randint(1, 40))
    elif kind == 4:
        data[:8] = rng.randrange(2**63).to_bytes(8, "little")
    elif kind == 5:
        header = int.from_bytes(data[:8], "little")
        place = 8 + rng.randrange(header)
        data[place] = rng.randrange(256)
    elif kind == 6:
        data = data.replace(b'"shape":[', b'"shape":[%d,' % rng.choice([0, 1, 2**40, 10**30]), 1)
    else:
        data[place:] = rng.randbytes(len(data) - place)
    return bytes(data)


@pytest.mark.parametrize("file", [LOG, STATE])
def test_damaged_files_are_refused_and_named(model, wanted, tmp_path, file):
    """120 mutations of each file; the other is whole."""
    folder = stored(model, tmp_path)
    good = (folder / file).read_bytes()
    owner = (folder / "owner.json").read_bytes()
    others = {path.name: path.read_bytes() for path in folder.iterdir()}
    rng = random.Random(file)
    for _ in range(120):
        damaged = mutate(good, rng)
        for name, content in others.items():
            (folder / name).write_bytes(content)
        (folder / file).write_bytes(damaged)
        (folder / "owner.json").write_bytes(owner)
        end = follow_up(model, tmp_path, wanted)
        if damaged == good:
            continue
        assert end.session == ("lost" if file == LOG else "replayed")
        assert f"{file} was refused" in end.note


def test_damaged_imports_change_nothing(model):
    """200 mutations of a snapshot that a client sends, signed or not."""
    engine = new_engine(model)
    run(engine, request("1", FIRST, session="s"))
    good = operate(engine, engine.snapshots.export(KEY, kv=True, limit=2**30))
    assert engine.snapshots.check(bytearray(good), trust_unsigned=False)["log"]
    before = banks(engine, "s")
    rng = random.Random(0)
    for _ in range(200):
        damaged = mutate(good, rng)
        if damaged == good:
            continue
        with pytest.raises(SnapshotRefused):
            engine.snapshots.check(bytearray(damaged), trust_unsigned=False)
        # unsigned ones are checked in structure: refused, or a session that runs
        try:
            checked = engine.snapshots.check(bytearray(damaged), trust_unsigned=True)
        except SnapshotRefused:
            continue
        future = engine.call(engine.snapshots.put(("tenant", "in"), checked, None))
        events = run(engine, request("in", FIRST + MORE, session="in"))["in"]
        assert future.result(1)
        finish(events)
    assert_same_banks(banks(engine, "s"), before)
    assert_nothing_held(engine)


def test_another_models_files_are_refused_and_stay(model, wanted, tmp_path):
    folder = stored(model, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for other in (prepare(tiny("llama", seed=1)), prepare(tiny("qwen3"))):
        engine = new_engine(other, session_dir=str(tmp_path))
        end = finish(run(engine, request("x", FIRST, session="s", commit=False))["x"])
        assert end.session == "lost"
        assert "fingerprint" in end.note
        crash(engine)
    assert (folder / LOG).read_bytes() == before[LOG]
    assert follow_up(model, tmp_path, wanted).session == "restored"


def test_an_unsigned_snapshot_is_refused_unless_allowed(model):
    one, two = new_engine(model), new_engine(model)
    run(one, request("1", FIRST, session="s"))
    future = one.call(one.snapshots.export(KEY, kv=False, limit=2**30))
    run_until_idle(one)
    with pytest.raises(SnapshotRefused, match="not signed by this server"):
        two.snapshots.check(bytearray(future.result()), trust_unsigned=False)
    assert two.snapshots.check(bytearray(future.result()), trust_unsigned=True)


CHILD = """
import sys, torch
torch.set_num_threads(1)
from pacellm.model.load import prepare
from tests.engine.helpers import new_engine, prompt, request, run
from tests.models import tiny
from tests.sessions.broken_disk import FIRST, KEY, MORE, full_disk, second_turn
engine = new_engine(prepare(tiny("llama")), session_dir=sys.argv[1])
ids = prompt(300, 1)
run(engine, request("1", ids, session="s"))
print("ready", flush=True)
session = engine.sessions.get(("tenant", "s"))
while True:
    session.stored = session.saved = None
    engine.mover._spill_to_disk(session, engine.mover.files)
    engine.worker.finish()
    run(engine, request("again", ids, session="s", commit=False))
"""


def kill_during_spills(model, tmp_path, wanted, times):
    rng = random.Random(1)
    for number in range(times):
        path = tmp_path / str(number)
        command = [sys.executable, "-c", CHILD, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
            assert child.stdout.readline() == b"ready\n"
            try:
                child.wait(rng.random() * 0.05)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
        end = follow_up(model, path, wanted)
        assert end.session in ("restored", "replayed", "lost")
        assert end.session != "lost" or end.note == "the session's log was never written"


def test_kill_9_during_a_spill(model, tmp_path, wanted):
    kill_during_spills(model, tmp_path, wanted, 3)


@pytest.mark.slow
def test_kill_9_during_a_hundred_spills(model, tmp_path, wanted):
    kill_during_spills(model, tmp_path, wanted, 100)


def test_out_of_memory_in_a_step_fails_one_request(monkeypatch):
    """The largest one: the others start again and answer as if nothing had been."""
    model = prepare(tiny("llama"))
    alone = tokens(run(new_engine(model), request("small", prompt(20, 1)))["small"])
    engine = new_engine(model)
    forward, calls = engine.runner.model.module.forward, []

    def failing(*args, **kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.runner.model.module, "forward", failing)
    events = run(engine, request("small", prompt(20, 1)), request("large", prompt(300, 2)))
    assert isinstance(events["large"][-1], Failed)
    assert "OutOfMemoryError" in str(events["large"][-1].error)
    assert tokens(events["small"]) == alone
    assert_nothing_held(engine)


def test_what_a_gpu_leaves_for_kv():
    gib = 2**30
    assert memory_left(free=60 * gib, total=80 * gib, step=4 * gib, utilization=0.9) == 48 * gib
    with pytest.raises(ConfigError, match="leaves nothing for KV") as error:
        memory_left(free=10 * gib, total=80 * gib, step=4 * gib, utilization=0.9)
    assert error.value.param == "gpu_memory_utilization"
