"""Random schedules of sessions longer than their budget, over little host memory and disks that are small or fail."""

import collections
import errno
import random

import pytest

from pacellm.model.load import prepare
from tests.engine.helpers import assert_nothing_held, operate, prompt
from tests.models import tiny
from tests.sessions.failing_disk import CALLS, FailingDisk
from tests.sessions.long_sessions import assert_counted, new, spill, turn, unlisted


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("smollm3"))


@pytest.fixture(scope="module")
def block_bytes(model):
    return 512 * model.bytes_per_token


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
