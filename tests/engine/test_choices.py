"""Several choices of one prompt: each as if it were alone, the first committed when all have ended."""

import dataclasses

import pytest

from pacellm.engine.engine import run_until_idle
from pacellm.errors import RequestError
from pacellm.model.load import prepare
from pacellm.types import ChoiceEnded, Delta, Failed, Finished, SamplingParams
from tests.engine.helpers import assert_nothing_held, assert_same_banks, banks, finish, new_engine, prompt, request, run
from tests.models import tiny

LONG = prompt(700, 1)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny("llama"))


def choice(events, index):
    return [t for event in events if isinstance(event, Delta) and event.index == index for t in event.token_ids]


def alone(model, seed, history=()):
    engine = new_engine(model)
    if history:
        run(engine, request("0", list(history), session="s"))
    sampling = dataclasses.replace(SAMPLED, seed=seed)
    events = run(engine, request("x", [*history, *LONG], sampling, session="s"))["x"]
    return choice(events, 0), banks(engine, "s")


@pytest.mark.parametrize("history", [(), tuple(prompt(90, 3))])
@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 64}, {"tight": True}, {"disk": True}])
def test_each_choice_is_what_it_is_alone(model, history, changes, tmp_path):
    changes = dict(changes)
    if changes.pop("tight", False):
        changes |= {"kv_cache_memory": 4 * 512 * model.bytes_per_token, "max_num_batched_tokens": 100}
    if changes.pop("disk", False):
        changes |= {"session_dir": str(tmp_path), "session_sync": True}
    engine = new_engine(model, max_num_seqs=4, **changes)
    if history:
        run(engine, request("0", list(history), session="s"))
    events = run(engine, request("x", [*history, *LONG], SAMPLED, session="s", n=3))["x"]
    for index in range(3):
        tokens, bank = alone(model, SAMPLED.seed + index, history)
        assert choice(events, index) == tokens
        if index == 0:
            assert_same_banks(banks(engine, "s"), bank)
    assert sorted(event.index for event in events if isinstance(event, ChoiceEnded)) == [0, 1, 2]
    end = finish(events)
    assert end.usage.completion_tokens == 36
    assert len([event for event in events if isinstance(event, Finished)]) == 1
    assert engine.sessions.get(("tenant", "s")).commits == 1 + bool(history)
    assert_nothing_held(engine)


def test_preempted_choices(model):
    engine = new_engine(model, max_num_batched_tokens=100, max_num_seqs=3)
    engine.add(request("x", LONG, SAMPLED, session="s", n=3))
    events = []
    while engine.has_work:
        events += [event for _, event in engine.step()]
        if len(engine.scheduler.running) == 3 and engine.scheduler.preemptions < 4:
            engine.scheduler.preempt(engine.scheduler.running[engine.scheduler.preemptions % 3])
    for index in range(3):
        assert choice(events, index) == alone(model, SAMPLED.seed + index)[0]
    assert_nothing_held(engine)


@pytest.mark.parametrize("steps", [1, 9, 14])
def test_abort_takes_all_choices(model, steps):
    engine = new_engine(model, max_num_batched_tokens=100)
    engine.add(request("x", LONG, SAMPLED, session="s", n=3))
    for _ in range(steps):
        engine.step()
    assert engine.abort("x")
    assert_nothing_held(engine)
    assert engine.sessions.get(("tenant", "s")) is None
    engine.prefix_cache.clear()
    assert engine.allocator.num_free == engine.num_blocks


def test_a_failed_choice_fails_the_request(model, monkeypatch):
    from pacellm.engine import answer as module

    original = module.Answers._token

    def explode(self, sequence, logits, chosen):
        if sequence.seed == SAMPLED.seed + 2 and len(sequence.generated) == 4:
            raise RuntimeError("broken on purpose")
        return original(self, sequence, logits, chosen)

    monkeypatch.setattr(module.Answers, "_token", explode)
    engine = new_engine(model)
    engine.add(request("x", LONG, SAMPLED, session="s", n=3))
    events = run_until_idle(engine)
    assert list(events) == ["x"]
    assert isinstance(events["x"][-1], Failed)
    assert sum(isinstance(event, Failed) for event in events["x"]) == 1
    assert_nothing_held(engine)
    assert engine.sessions.get(("tenant", "s")) is None


def test_n_is_bounded(model):
    engine = new_engine(model, max_num_seqs=2)
    for n in (0, 3, 10**9):
        with pytest.raises(RequestError) as caught:
            engine.add(request("x", LONG, n=n))
        assert caught.value.param == "n"


def test_choices_of_no_tokens_end(model):
    engine = new_engine(model)
    events = run(engine, request("a", prompt(20), SamplingParams(max_tokens=0), n=3))
    assert events.keys() == {"a"}
    assert sorted(event.index for event in events["a"] if isinstance(event, ChoiceEnded)) == [0, 1, 2]
    assert isinstance(events["a"][-1], Finished)
