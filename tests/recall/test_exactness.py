"""Beyond the budget, too, answers and banks do not depend on cuts, company, tiers, forks or replays."""

import dataclasses

import pytest

from pacellm import PAConfig
from pacellm.engine.engine import run_until_idle
from pacellm.model.load import prepare
from pacellm.types import Delta, Outline, SamplingParams
from tests.engine.helpers import finish, new_engine, prompt, request, tokens
from tests.models import tiny

BANK = PAConfig(preset="reference", bank_size=12, segment=64, theta_high=0.9, theta_low=0.5)
SIZES = {
    "working_memory": 2560,
    "working_memory_window": 512,
    "working_memory_recall": 1024,
    "max_model_len": 50_000,
    "bank": BANK,
}
READ = SamplingParams(max_tokens=0)
ANSWER = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=0)
LONG = SamplingParams(max_tokens=700, temperature=0, ignore_eos=True, logprobs=0)
ASKED = Outline(opening=3, question=(20, 5))


@pytest.fixture(scope="module", params=["llama", "smollm3"])
def model(request):
    return tiny(request.param)


def told(events):
    """Tokens with log-probabilities, and what the banks did."""
    return [(one.token_id, one.logprob) for e in events if isinstance(e, Delta) for one in e.logprobs], finish(
        events
    ).bank


class Story:
    """A session's turns: read beyond the budget, two questions, an answer that rolls on, a second try of the last."""

    def __init__(self, engine, between=lambda engine: None, read=(4700,)):
        self.engine, self.context, self.found = engine, [], []
        self.between = between
        whole = prompt(4700)
        for length in read:
            self.turn(whole[:length], READ)
        self.ask(31, seed=1)
        self.ask(40, seed=2)
        before = list(self.context)
        self.ask(33, seed=3, sampling=LONG)
        self.context = before
        self.ask(33, seed=4)

    def ask(self, length, seed, sampling=ANSWER):
        self.turn([*self.context, *prompt(length, seed)], sampling)

    def turn(self, ids, sampling):
        name = f"t{len(self.found)}"
        asked = request(name, ids, sampling, session="s")
        events = self.run(dataclasses.replace(asked, outline=ASKED))
        self.context = [*ids, *tokens(events)[:-1]]
        self.found.append(told(events))
        self.between(self.engine)

    def run(self, asked):
        self.engine.add(asked)
        return run_until_idle(self.engine)[asked.request_id]


@pytest.fixture(scope="module")
def alone(model):
    return Story(new_engine(prepare(model), **SIZES)).found


def answers(found):
    return [each for each in found if each[0]]


@pytest.mark.parametrize("tokens", [96, 700])
def test_chunks(model, alone, tokens):
    assert Story(new_engine(prepare(model), **SIZES, max_num_batched_tokens=tokens)).found == alone


def test_growth_in_many_turns(model):
    """Banks that act are cut where a prompt ends, so they are only observed here."""
    settings = {**SIZES, "bank": PAConfig(bank_size=12, segment=64)}
    one, many = (Story(new_engine(prepare(model), **settings), read=read).found
                 for read in ((4700,), (100, 2500, 2600, 3333, 4700)))  # fmt: skip
    assert [found for found, _ in answers(many)] == [found for found, _ in answers(one)]


def test_host_memory(model, alone):
    """Each turn begins with a restore."""
    found = Story(new_engine(prepare(model), **SIZES, session_memory=0, session_host_memory=2**28))
    assert found.found == alone
    assert found.engine.mover.stats.restores == 4


def test_disk(model, alone, tmp_path):
    """The same with blocks in files, which leave host memory while a prompt is read."""
    settings = {**SIZES, "session_memory": 0, "session_host_memory": 0, "session_dir": str(tmp_path)}
    found = Story(new_engine(prepare(model), **settings))
    assert found.found == alone
    assert found.engine.mover.stats.restores == 4
    assert found.engine.sessions.get(("tenant", "s")).tier == "disk"


def test_replays(model, alone):
    """Each turn begins with nothing but the log."""

    def drop(engine):
        engine.prefix_cache.clear()
        for session in engine.sessions:
            engine.sessions.drop(session)

    assert Story(new_engine(prepare(model), **SIZES), drop).found == alone


def test_a_history_that_host_memory_cannot_hold_is_refused(model):
    engine = new_engine(prepare(model), **SIZES, session_host_memory=4 * 512 * prepare(model).bytes_per_token)
    for name, length in (("long", 4700), ("short", 2000)):
        engine.add(request(name, prompt(length), READ))
    events = run_until_idle(engine)
    assert "host memory" in str(events["long"][-1].error)
    assert finish(events["short"])


def test_idle_histories_give_way(model):
    """Host memory holds one history: each turn takes the place of the other session's, whose log brings it back."""
    room = 14 * 512 * prepare(model).bytes_per_token
    settings = {**SIZES, "bank": PAConfig(bank_size=12, segment=64)}  # banks that act would have read it twice
    engine = new_engine(prepare(model), **settings, session_host_memory=room)
    first = {}
    for turn in range(2):
        for session in ("a", "b"):
            ids = [*prompt(4700, ord(session)), *prompt(40, 9)]
            asked = request(f"{session}{turn}", ids, ANSWER, session=session, commit=not turn)
            engine.add(dataclasses.replace(asked, outline=ASKED))
            events = run_until_idle(engine)[f"{session}{turn}"]
            assert told(events)[0] == first.setdefault(session, told(events)[0])
            assert engine.mover.host.bytes <= room
    assert finish(events).usage.replayed_tokens or finish(events).usage.cached_tokens < 4700


def test_restarts(model, alone, tmp_path):
    story = Story.__new__(Story)
    settings = {**SIZES, "session_dir": str(tmp_path), "session_sync": True}

    def restart(engine):
        engine.close()
        story.engine = new_engine(prepare(model), **settings)

    story.__init__(new_engine(prepare(model), **settings), restart)
    assert story.found == alone
    story.engine.close()


def test_forks(model, alone):
    """Each turn goes on from a fork of the last."""
    numbers = iter(range(100))

    class Forked(Story):
        name = "s"

        def run(self, asked):
            last, self.name = self.name, f"f{next(numbers)}"
            if self.found:
                done = self.engine.call(self.engine.ops.fork(("tenant", last), ("tenant", self.name), None))
                run_until_idle(self.engine)
                done.result()
            return super().run(dataclasses.replace(asked, session=("tenant", self.name)))

    assert Forked(new_engine(prepare(model), **SIZES)).found == alone


def test_company(model, alone):
    """Others read, ask and decode beside it, in memory that holds not all of them, so that some begin again."""
    engine = new_engine(prepare(model), **SIZES, kv_cache_memory=12 * 512 * prepare(model).bytes_per_token)
    numbers = iter(range(100))

    class Together(Story):
        def run(self, asked):
            for _ in range(2):
                number = next(numbers)
                other = request(f"o{number}", prompt(3000 + 311 * number % 2000, 50 + number), ANSWER)
                self.engine.add(dataclasses.replace(other, outline=ASKED))
            return super().run(asked)

    found = Together(engine)
    assert found.found == alone


def test_a_request_that_was_given_up_is_taken_up_again(model, alone):
    class Again(Story):
        def run(self, asked):
            self.engine.add(dataclasses.replace(asked, request_id="first"))
            for _ in range(4):
                self.engine.step()
            self.engine.abort("first")
            return super().run(asked)

    found = Again(new_engine(prepare(model), **SIZES, max_num_batched_tokens=512))
    assert [one for one, _ in found.found] == [one for one, _ in alone]
    assert found.engine.prefix_cache.hits


def test_choices(model):
    engine = new_engine(prepare(model), **SIZES)
    sampling = SamplingParams(max_tokens=6, temperature=1.0, seed=7, ignore_eos=True)
    for name, n in (("one", 1), ("three", 3)):
        asked = request(name, prompt(4000), sampling, n=n)
        engine.add(dataclasses.replace(asked, outline=ASKED))
    events = run_until_idle(engine)
    first = [e for e in events["three"] if isinstance(e, Delta) and e.index == 0]
    assert tokens(first) == tokens(events["one"])
    assert {e.index for e in events["three"] if isinstance(e, Delta)} == {0, 1, 2}
