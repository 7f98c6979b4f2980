"""How banks take part, chosen by the engine or by a request: what is observed changes nothing, what acts acts alone."""

import pytest
import torch

from pacellm import PAConfig
from pacellm.config import PRESETS
from pacellm.model.load import prepare
from pacellm.modes import MODES, preset_of, resolve, writes
from pacellm.sessions.disk import STATE
from pacellm.types import Delta, PromptScores, SamplingParams
from tests.engine.helpers import (
    BANK,
    assert_nothing_held,
    assert_same_banks,
    banks,
    finish,
    new_engine,
    operate,
    prompt,
    request,
    run,
    tokens,
    use_static_decode,
)
from tests.models import tiny

OBSERVE = BANK.of("observe")
SCORED = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=3)
FAMILIES = ["llama", "mistral", "smollm3", "phi3", "qwen3"]


def test_modes():
    assert [preset_of(mode) for mode in MODES] == [None, *PRESETS, *PRESETS]
    assert [writes(mode) for mode in MODES] == [False, True, True, True, False, False, False]
    for preset in PRESETS:
        assert resolve("on", preset) == preset
        assert resolve("read_only", preset) == f"{preset}_read_only"
        assert {resolve(mode, preset) for mode in MODES} == set(MODES)


def seen(engine, *requests):
    """Tokens and log-probabilities, those of prompts too, by request."""
    found = {}
    for name, events in run(engine, *requests).items():
        finish(events)
        deltas = [score for event in events if isinstance(event, Delta) for score in event.logprobs]
        scores = [score for event in events if isinstance(event, PromptScores) for score in event.logprobs]
        found[name] = (tokens(events), deltas, scores)
    return found


def conversation(name, session=None, **changes):
    """Two turns of a session."""
    first, more = prompt(200, 1), prompt(70, 2)
    return [
        request(f"{name}{number}", ids, SCORED, session=session or name, **changes)
        for number, ids in enumerate([first, [*first, *more]])
    ]


@pytest.mark.parametrize("static", [False, True], ids=["ordinary", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_observed_answers_are_plain_ones_to_the_bit(family, static):
    model = prepare(tiny(family))
    found = []
    for changes in ({"bank": OBSERVE}, {"pa": False}):
        engine = new_engine(model, max_num_batched_tokens=90, **changes)
        if static:
            use_static_decode(engine)
        results = {}
        for item in conversation("a"):
            results |= seen(engine, item)
        scored = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2)
        results |= seen(engine, request("scored", prompt(150, 4), scored), request("b", prompt(90, 5), SCORED))
        found.append(results)
    assert found[0] == found[1]
    assert found[0]["scored"][2]


def test_observed_banks_grow():
    model = prepare(tiny("llama"))
    engine = new_engine(model, bank=OBSERVE)
    end = finish(run(engine, request("a", prompt(300, 1), session="a"))["a"])
    assert end.bank.replacements
    assert end.bank.hits + end.bank.fuses + end.bank.misses
    assert engine.sessions.get(("tenant", "a")).log[0].pa == "observe"


@pytest.mark.parametrize("static", [False, True], ids=["ordinary", "static"])
def test_modes_side_by_side_are_each_alone_to_the_bit(static):
    """One engine computes all modes at once what engines of each preset compute one after the other."""
    model = prepare(tiny("llama"))
    alone, expected = {}, {}
    for mode in MODES:
        engine = new_engine(model, bank=BANK.of(preset_of(mode) or "reference"), max_num_seqs=1)
        choice = "off" if mode == "off" else "on" if writes(mode) else "read_only"
        for turn, item in zip(("on", choice), conversation(mode), strict=True):
            if mode == "off":
                turn = "off"
            object.__setattr__(item, "pa", turn)
            expected |= seen(engine, item)
        alone[mode] = banks(engine, mode)
    engine = new_engine(model, max_num_seqs=16, max_num_batched_tokens=100)
    if static:
        use_static_decode(engine)
    firsts, seconds = zip(*(conversation(mode) for mode in MODES), strict=True)
    for mode, first, second in zip(MODES, firsts, seconds, strict=True):
        object.__setattr__(first, "pa", preset_of(mode) or "off")
        object.__setattr__(second, "pa", mode)
    found = seen(engine, *firsts) | seen(engine, *seconds)
    assert found == expected
    for mode in MODES:
        assert_same_banks(banks(engine, mode), alone[mode])
        assert engine.sessions.get(("tenant", mode)).log[1].pa == mode
    answers = {mode: found[f"{mode}1"][1] for mode in MODES}
    assert answers["observe"] == answers["off"] == answers["observe_read_only"]
    assert answers["reference"] != answers["off"] != answers["paper"] != answers["reference"]
    assert_nothing_held(engine)


def test_kept_progress_does_not_cross_modes():
    model, ids = prepare(tiny("llama")), prompt(400, 3)
    modes = ("off", *PRESETS)
    engine = new_engine(model, max_num_batched_tokens=100)
    expected = {mode: seen(new_engine(model), request("x", ids, SCORED, pa=mode))["x"] for mode in modes}
    for again in (False, True):
        for mode in modes:
            hits, name = engine.prefix_cache.hits, f"{mode} {again}"
            assert seen(engine, request(name, ids, SCORED, pa=mode))[name] == expected[mode]
            assert engine.prefix_cache.hits == hits + again, "only the same mode uses it"


def test_a_session_asked_under_all_presets_is_replayed_restored_and_forked_to_the_bit(tmp_path):
    model = prepare(tiny("smollm3"))
    settings = {"bank": OBSERVE, "session_dir": str(tmp_path)}
    engine = new_engine(model, **settings)
    asked = ["on", "paper", "reference_read_only", "off", "reference", "observe", "read_only"]
    wanted = ["observe", "paper", "reference_read_only", "off", "reference", "observe", "observe_read_only"]
    history = []
    for number, mode in enumerate(asked):
        history += prompt(90, number)
        history += tokens(run(engine, request(str(number), history, session="s", pa=mode))[str(number)])

    def modes(session):
        return [turn.pa for turn in engine.sessions.get(("tenant", session)).log]

    assert modes("s") == wanted
    mine, ids = banks(engine, "s"), [*history, *prompt(20, 9)]
    operate(engine, engine.ops.fork(("tenant", "s"), ("tenant", "fork"), None))
    expected = seen(engine, request("x", ids, SCORED, session="s"))["x"]
    after = banks(engine, "s")
    assert_same_banks(banks(engine, "fork"), mine)
    engine.close()

    # the server's preset is another now: the log says what each turn was computed by
    engine = new_engine(model, **{**settings, "bank": OBSERVE.of("paper")})
    restored = run(engine, request("y", ids, SCORED, session="fork", pa="observe"))["y"]
    assert finish(restored).session == "restored"
    assert_same_banks(banks(engine, "fork"), after)
    operate(engine, engine.ops.fork(("tenant", "fork"), ("tenant", "other"), None))
    rest = [*ids, *expected[0], *prompt(30, 10)]
    continued = seen(engine, request("z", rest, SCORED, session="fork"))
    after = banks(engine, "fork")
    engine.close()
    for state in tmp_path.glob(f"*/{STATE}"):
        state.unlink()
    engine = new_engine(model, **{**settings, "bank": OBSERVE.of("paper")})
    replayed = run(engine, request("z", rest, SCORED, session="other"))["z"]
    assert finish(replayed).session == "replayed"
    assert modes("other") == [*wanted, "observe", "paper"]
    assert tokens(replayed) == continued["z"][0]
    assert_same_banks(banks(engine, "other"), after)
    assert_nothing_held(engine)
    engine.close()


def test_choices_of_one_request_share_its_mode():
    model = prepare(tiny("llama"))
    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True, logprobs=1)
    for mode in ("observe", "paper"):
        several = run(new_engine(model), request("x", prompt(150, 1), sampling, session="s", pa=mode, n=2))["x"]
        firsts = [event for event in several if isinstance(event, Delta) and event.index == 0]
        alone = run(new_engine(model), request("x", prompt(150, 1), sampling, session="s", pa=mode))["x"]
        assert tokens(firsts) == tokens(alone)
        plain = run(new_engine(model, pa=False), request("x", prompt(150, 1), sampling))["x"]
        assert (tokens(alone) == tokens(plain)) or mode == "paper"


def test_numbers_that_are_given_hold_for_every_preset():
    config = PAConfig(theta_high=0.9)
    assert [(config.of(preset).high, config.of(preset).low) for preset in PRESETS] == [
        (0.9, 0.25), (0.9, 0.25), (0.9, 0.3)
    ]  # fmt: skip
    assert [config.of(preset).acts for preset in PRESETS] == [False, True, True]


def test_no_memory_for_a_stage_fails_the_request_that_needs_it(monkeypatch):
    engine = new_engine(prepare(tiny("llama")))

    def full(stages):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine.pool, "_with_paper_sums", full)
    found = run(engine, request("a", prompt(200, 1), pa="reference"), request("b", prompt(60, 2), pa="paper"))
    finish(found["a"])
    assert "no memory for its stage" in str(found["b"][-1].error)
    assert_nothing_held(engine)
