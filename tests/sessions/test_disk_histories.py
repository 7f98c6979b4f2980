"""Synced sessions on a disk that fails and in a process that dies: random histories, and those that were wrong once."""

import errno

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from pacellm.types import Failed
from tests.engine.helpers import crash, new_engine, prompt, request
from tests.models import tiny
from tests.sessions.disk_histories import ANSWER, History, Op, draw
from tests.sessions.failing_disk import FailingDisk

SETTINGS = ({}, {"session_host_memory": 300_000}, {"session_log_memory": 200})
OWNER_FAILS = {"fails": ("replace", "owner.json.draft")}
FIRST, MORE = Op("turn", number=1), Op("turn", number=2)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


def check(ops, model, path, monkeypatch, settings=SETTINGS[0]):
    History(model, path, monkeypatch, check_integrity=False, **settings).run(ops)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 120))])
def test_random_histories(model, tmp_path, monkeypatch, seed):
    check(draw(seed, 60), model, tmp_path, monkeypatch, SETTINGS[seed % 3])


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 40))])
def test_random_histories_beyond_the_budget(model, tmp_path, monkeypatch, seed):
    settings = {"working_memory": 2048, "working_memory_window": 512, "max_model_len": 50_000}
    settings["session_host_memory"] = (30, 12)[seed % 2] * 512 * model.bytes_per_token
    ops = draw(seed, 30)
    History(model, tmp_path, monkeypatch, longer=2300, check_integrity=False, **settings).run(ops)


@pytest.mark.parametrize(
    "ops",
    [
        # what is undone by a kill where the disk has not taken it, whatever changed nothing since
        [FIRST, Op("reset", fails="full"), Op("turn", number=2, fails="full"), Op("peek", number=3),
         Op("kill", dies=99, looks=True)],
        [FIRST, Op("delete", fails="full"), Op("create"), Op("kill", dies=99, looks=True)],
        # the log has taken its place, and owner.json has not
        [FIRST, Op("turn", number=2, **OWNER_FAILS, looks=True), Op("evict", number=1, looks=True)],
        [Op("turn", number=2, **OWNER_FAILS, looks=True), Op("turn", number=3, looks=True)],
        [FIRST, Op("turn", number=2, fails="sync folder", looks=True), Op("turn", number=3, looks=True)],
        [FIRST, Op("delete"), Op("create"), Op("turn", number=2, **OWNER_FAILS, looks=True)],
        [FIRST, MORE, Op("reset", dies=("replace", "owner.json.draft"), looks=True)],
        [FIRST, Op("reset", **OWNER_FAILS, looks=True), Op("kill", dies=99, looks=True)],
        # a tombstone that is written again and again, as the files do not go
        [FIRST, Op("delete", fails="unlink"), Op("create", fails="unlink"), Op("show", fails="unlink"),
         Op("show", fails="unlink", looks=True)],
        # the mark of a server that ends
        [FIRST, Op("close", fails="unlink", looks=True)],
    ],
)  # fmt: skip
def test_what_may_be_seen(model, tmp_path, monkeypatch, ops):
    check(ops, model, tmp_path, monkeypatch)


@pytest.mark.parametrize("fails", [("replace", "owner.json.draft"), "sync folder"])
def test_a_commit_that_may_be_there_says_so_and_stays(model, tmp_path, monkeypatch, fails):
    engine = new_engine(model, session_dir=str(tmp_path), session_sync=True)
    disk = FailingDisk(tmp_path)
    disk.install(monkeypatch)
    disk.begin(fails, None, errno.EIO)
    engine.add(request("x", prompt(5), ANSWER, session="s"))
    failed = run_until_idle(engine)["x"][-1]
    disk.calm()
    assert isinstance(failed, Failed)
    assert "Input/output error; the change may be there all the same" in str(failed.error)
    key, shown = ("tenant", "s"), []
    for _ in range(2):
        future = engine.call(engine.ops.show(key))
        run_until_idle(engine)
        shown.append(future.result(1)["commits"])
        crash(engine)
        engine = new_engine(model, session_dir=str(tmp_path), session_sync=True)
    assert shown == [1, 1]
    crash(engine)
