"""Random histories of several sessions against an oracle that runs each alone and never evicts: the same bits."""

import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from pacellm.types import Append, Finished, SamplingParams
from tests.engine.helpers import (
    assert_nothing_held,
    assert_same_banks,
    banks,
    crash,
    new_engine,
    prompt,
    request,
    tokens,
    use_static_decode,
)
from tests.models import tiny

NAMES = "abcd"
ENDS = ("text", "answer", "system", "user", "assistant", "tool")
MODEL = prepare(tiny("smollm3"))
ANSWER = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
names = st.sampled_from(NAMES)


class Oracle:
    """One session, alone in an engine that never evicts."""

    def __init__(self, asked=()):
        self.engine, self.asked, self.reads = new_engine(MODEL, check_integrity=False), [], None
        for ids in asked:
            self.ask(ids)

    def ask(self, ids):
        self.asked.append(ids)
        self.engine.prefix_cache.clear()
        self.engine.add(request("x", ids, ANSWER, session="s"))
        events = run_until_idle(self.engine)["x"]
        self.reads = events[-1].bank
        return tokens(events)


class Sessions(RuleBasedStateMachine):
    """The engine under test has room for two or three sessions, host memory for one, and a directory."""

    def __init__(self):
        super().__init__()
        self.path = tempfile.mkdtemp(prefix="pacellm-sessions-")
        self.oracles, self.history, self.number = {}, {}, 0
        self.engine = None

    @initialize(host=st.sampled_from([0, 300_000]), sync=st.booleans(), has_disk=st.booleans(), log=st.booleans(),
                ahead=st.booleans(), size=st.sampled_from([None, 400_000]))  # fmt: skip
    def begin(self, host, sync, has_disk, log, ahead, size):
        self.has_disk, self.sync = has_disk, sync and has_disk
        disk = {"session_dir": self.path, "session_sync": self.sync, "session_disk_size": size} if has_disk else {}
        if log and has_disk:
            disk["session_log_memory"] = 3000
        self.settings = {
            "kv_cache_memory": 8 * 512 * MODEL.bytes_per_token, "session_memory": 4 * 512 * MODEL.bytes_per_token,
            "session_host_memory": host, "max_num_batched_tokens": 150, "max_num_seqs": 3, **disk,
        }  # fmt: skip
        self.ahead = ahead
        self._begin()

    def _begin(self):
        self.engine = new_engine(MODEL, **self.settings)
        if self.ahead:
            use_static_decode(self.engine)

    def _prompt(self, name, length, keep):
        self.number += 1
        history = self.history.get(name, [])
        return [*history[: round(len(history) * keep)], *prompt(length, self.number)][-900:]

    def _compare(self, name, ids, events):
        end = events[-1]
        assert isinstance(end, Finished), end
        assert end.session != "lost"
        oracle = self.oracles.setdefault(name, Oracle())
        assert tokens(events) == oracle.ask(ids)
        assert end.bank == oracle.reads
        self.history[name] = ids + tokens(events)
        session = self.engine.sessions.get(("tenant", name))
        if session is not None and session.is_resident and not session.moving:
            assert_same_banks(banks(self.engine, name), banks(oracle.engine, "s"))

    @rule(chosen=st.lists(names, min_size=1, max_size=3, unique=True), length=st.integers(1, 300),
          keep=st.sampled_from([1, 1, 1, 0.6, 0]))  # fmt: skip
    def ask(self, chosen, length, keep):
        asked = {name: self._prompt(name, length, keep) for name in chosen}
        for name, ids in asked.items():
            self.engine.add(request(name, ids, ANSWER, session=name))
        events = run_until_idle(self.engine)
        for name, ids in asked.items():
            self._compare(name, ids, events[name])

    @rule(name=names, length=st.integers(1, 200), again=st.booleans())
    def append(self, name, length, again):
        """Only what is new is sent, twice in a row where the second one has to wait for the first."""
        history = self.history.get(name)
        if not history or len(history) + 2 * length > 900:
            return
        tails = []
        for number in range(1 + again):
            self.number += 1
            tails.append(prompt(length, self.number))
            made = Append(dict.fromkeys(ENDS, tails[-1]), tails[-1])
            self.engine.add(request(str(number), tails[-1], ANSWER, session=name, append=made))
        events = run_until_idle(self.engine)
        for number, tail in enumerate(tails):
            assert events[str(number)][-1].kinship.dropped_tokens == 0
            asked = [*self.history[name], *tail]
            if number == again:
                self._compare(name, asked, events[str(number)])
            else:
                assert tokens(events[str(number)]) == self.oracles[name].ask(asked)
                assert events[str(number)][-1].bank == self.oracles[name].reads
                self.history[name] = asked + tokens(events[str(number)])

    @rule(name=names, length=st.integers(1, 400), steps=st.integers(0, 8))
    def abort(self, name, length, steps):
        ids, events = self._prompt(name, length, 1), []
        self.engine.add(request("gone", ids, ANSWER, session=name))
        for _ in range(steps):
            events += [event for _, event in self.engine.step()]
        if not self.engine.abort("gone"):  # it had ended, or was about to
            events += run_until_idle(self.engine).get("gone", [])
            self._compare(name, ids, events)

    @rule(settle=st.booleans())
    def evict(self, settle):
        self.engine.eviction.evict_one()
        if settle:
            run_until_idle(self.engine)

    @rule()
    def drop(self):
        for session in self.engine.sessions:
            if session.is_resident and not session.moving:
                self.engine.sessions.drop(session)

    def _operate(self, operation):
        future = self.engine.call(operation)
        run_until_idle(self.engine)
        return future.result(1)

    # whether an abort came too late is a matter of time, so no draw may depend on which sessions there are
    @rule(source=names, into=names)
    def fork(self, source, into):
        if source not in self.oracles or into in self.oracles or not self.history.get(source):
            return
        self._operate(self.engine.ops.fork(("tenant", source), ("tenant", into), None))
        self.oracles[into] = Oracle(self.oracles[source].asked)
        self.history[into] = list(self.history[source])

    @rule(name=names, delete=st.booleans())
    def reset_or_delete(self, name, delete):
        if name not in self.oracles:
            return
        ops = self.engine.ops
        self._operate(ops.delete(("tenant", name)) if delete else ops.reset(("tenant", name)))
        self.history.pop(name, None)
        if delete:
            self.oracles.pop(name)
        else:
            self.oracles[name] = Oracle()

    @precondition(lambda self: self.has_disk)
    @rule(clean=st.booleans())
    def restart(self, clean):
        if clean or not self.sync:
            self.engine.close()
        else:
            crash(self.engine)
        self._begin()

    @invariant()
    def adds_up(self):
        if self.engine is not None:
            self.engine.parts.integrity.check()
            assert self.engine.mover.host.bytes <= self.settings["session_host_memory"]
            if self.settings.get("session_disk_size"):
                assert self.engine.mover.files.usage.bytes <= self.settings["session_disk_size"]

    def teardown(self):
        if self.engine is not None:
            run_until_idle(self.engine)
            self._operate(self.engine.ops.delete_all("tenant"))
            assert_nothing_held(self.engine)
            assert self.engine.allocator.num_free == self.engine.num_blocks
            assert self.engine.pool.num_free == self.engine.pool.num_rows
            assert self.engine.mover.host.bytes == self.engine.sessions.log_bytes == 0
            assert not self.has_disk or self.engine.mover.files.usage.bytes == 0
            self.engine.close()
        shutil.rmtree(self.path)


def check(examples, steps):
    run_state_machine_as_test(
        Sessions,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_random_histories():
    check(12, 15)


@pytest.mark.slow
def test_many_random_histories():
    check(300, 30)
