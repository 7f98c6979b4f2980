"""Constrained decoding in the engine: valid, and the same whatever else runs."""

import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import threading

import jsonschema
import numpy as np
import pytest
import torch

from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.errors import RequestError
from pacellm.model.load import load
from pacellm.run.sampler import sample
from pacellm.server.thread_pools import FairThreadPool
from pacellm.text import constraints
from pacellm.text.grammar import Grammars, _Kept
from pacellm.text.sandbox import GuidanceVocabulary
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Delta, Failed, Finished, FinishReason, SamplingParams
from tests.engine.helpers import assert_nothing_held, finish, prompt, request, tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 9999},
        "b": {"type": "array", "items": {"enum": ["x", "yy"]}, "minItems": 1, "maxItems": 5},
        "c": {"type": "string", "maxLength": 5},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
SAMPLED = SamplingParams(max_tokens=200, temperature=1.0, seed=7)
PROMPTS = {"a": prompt(37, 1, 2048), "b": prompt(151, 2, 2048)}


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return load(MODEL_PATH)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    made = Grammars(tokenizer.backend, frozenset([2]))
    yield made
    made.close()


@pytest.fixture(scope="module")
def constraint(grammars):
    return grammars.compile(constraints.of_json(SCHEMA, "response_format"))


def engine_of(model, tokenizer, **changes):
    from pacellm.config import EngineConfig

    settings = {"kv_cache_memory": 64 * 2**20, "check_integrity": True, "max_num_mixed_tokens": 512, **changes}
    settings.setdefault("max_num_batched_tokens", 1024)
    return Engine(model, EngineConfig(**settings), tokenizer.backend)


def text(events, index=0):
    return "".join(event.text for event in events if isinstance(event, Delta) and event.index == index)


def one(model, tokenizer, constraint, sampling=SAMPLED, name="a"):
    engine = engine_of(model, tokenizer)
    engine.add(request(name, PROMPTS[name], sampling, constraint=constraint))
    return run_until_idle(engine)[name]


def test_company_chunks_and_preemption_change_nothing(model, tokenizer, constraint):
    alone = {name: tokens(one(model, tokenizer, constraint, name=name)) for name in PROMPTS}
    rng = random.Random(0)
    engine = engine_of(model, tokenizer, max_num_batched_tokens=30, max_num_mixed_tokens=30)
    for name, ids in PROMPTS.items():
        engine.add(request(name, ids, SAMPLED, session=name, constraint=constraint))
    engine.add(request("free", PROMPTS["a"], dataclasses.replace(SAMPLED, max_tokens=40, ignore_eos=True)))
    events = {}
    while engine.has_work:
        for name, event in engine.step():
            events.setdefault(name, []).append(event)
        if engine.scheduler.running and engine.scheduler.preemptions < 9 and rng.random() < 0.3:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
    assert engine.scheduler.preemptions == 9
    for name, wanted in alone.items():
        assert tokens(events[name]) == wanted
        jsonschema.validate(json.loads(text(events[name])), SCHEMA)
    assert_nothing_held(engine)


def test_a_matcher_starts_again_where_tokens_were_taken_back(constraint):
    rng = np.random.default_rng(0)
    matcher, generated, masks = constraint.new_matcher(), [], []
    for _ in range(12):
        masks.append(matcher.allowed(generated, 2048))
        generated.append(int(rng.choice(masks[-1].nonzero()[0])))
    for length in (5, 11, 0, 8):
        assert (matcher.allowed(generated[:length], 2048) == masks[length]).all()
        assert (constraint.new_matcher().allowed(generated[:length], 2048) == masks[length]).all()


def test_choices_have_matchers_of_their_own(model, tokenizer, constraint):
    engine = engine_of(model, tokenizer, max_num_seqs=4)
    engine.add(request("x", PROMPTS["b"], SAMPLED, constraint=constraint, n=3))
    events = run_until_idle(engine)["x"]
    finish(events)
    for index in range(3):
        sampling = dataclasses.replace(SAMPLED, seed=SAMPLED.seed + index)
        assert text(events, index) == text(one(model, tokenizer, constraint, sampling, "b"))
        jsonschema.validate(json.loads(text(events, index)), SCHEMA)


@pytest.mark.parametrize("sampling", [
    {"temperature": 0.0}, {"temperature": 2.0}, {"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0},
    {"frequency_penalty": 2.0, "presence_penalty": 2.0}, {"repetition_penalty": 100.0}, {"logprobs": 3},
    {"logit_bias": tuple((token, 100.0) for token in range(6, 400))},
])  # fmt: skip
def test_every_way_of_sampling_keeps_to_the_grammar(model, tokenizer, constraint, sampling):
    events = one(model, tokenizer, constraint, dataclasses.replace(SAMPLED, **sampling))
    assert finish(events).reason is FinishReason.STOP
    jsonschema.validate(json.loads(text(events)), SCHEMA)


def test_end_tokens_come_only_where_the_grammar_may_end(model, tokenizer, grammars):
    constraint = grammars.compile(constraints.of_regex("[a-z]{4}([a-z]{4})*", "x"))
    eager = dataclasses.replace(SAMPLED, logit_bias=((2, 100.0),))
    events = one(model, tokenizer, constraint, eager)
    assert finish(events).reason is FinishReason.STOP
    assert len(text(events)) == 4
    assert tokens(events)[-1] == 2
    lazy = dataclasses.replace(SAMPLED, logit_bias=((2, -100.0),), max_tokens=30)
    events = one(model, tokenizer, constraint, lazy)
    assert finish(events).reason is FinishReason.LENGTH
    assert len(tokens(events)) == 30


def test_a_grammar_that_can_only_end_ends_at_once(model, tokenizer, grammars):
    events = one(model, tokenizer, grammars.compile(constraints.of_choice(["yes"], "x")))
    assert text(events) == "yes"
    assert 2 not in tokens(events)
    exact = dataclasses.replace(SAMPLED, max_tokens=len(tokens(events)))
    assert finish(one(model, tokenizer, grammars.compile(constraints.of_choice(["yes"], "x")), exact)).reason == "stop"


def test_a_matcher_that_fails_fails_its_request(model, tokenizer, constraint):
    class Broken:
        def new_matcher(self):
            return self

        def allowed(self, generated, size):
            if len(generated) == 2:
                raise RequestError("no way on", param="response_format")
            return np.ones(size, dtype=bool)

        def is_complete(self, generated):
            return False

    engine = engine_of(model, tokenizer)
    engine.add(request("bad", PROMPTS["a"], SAMPLED, constraint=Broken()))
    engine.add(request("good", PROMPTS["a"], SAMPLED, constraint=constraint))
    events = run_until_idle(engine)
    assert isinstance(events["bad"][-1], Failed)
    assert events["bad"][-1].error.param == "response_format"
    assert isinstance(events["good"][-1], Finished)
    assert tokens(events["good"]) == tokens(one(model, tokenizer, constraint))
    assert_nothing_held(engine)


def test_end_tokens_cannot_be_ignored(model, tokenizer, constraint):
    engine = engine_of(model, tokenizer)
    with pytest.raises(RequestError) as caught:
        engine.add(request("x", [5, 6], dataclasses.replace(SAMPLED, ignore_eos=True), constraint=constraint))
    assert caught.value.param == "ignore_eos"


def test_only_allowed_tokens_are_sampled():
    logits, allowed = torch.linspace(0, 9, 50), np.zeros(50, dtype=bool)
    allowed[[3, 11]] = True
    for seed in range(200):
        for params in (SamplingParams(), SamplingParams(top_k=40), SamplingParams(temperature=2, top_p=0.99)):
            assert sample(logits, params, [1], [], seed, allowed)[0] in (3, 11)
    assert sample(logits, SamplingParams(temperature=0), [1], [], 0, allowed)[0] == 11


def test_greedy_tokens():
    greedy = GuidanceVocabulary([b"<s>", b"a", b"b", b"ab", b""], [0], [0])
    assert greedy(b"abba") == [3, 2, 1]
    assert greedy("a<s>b") == [1, 2]


def test_what_is_forced_is_written_as_the_model_would(tokenizer, grammars):
    grammars.compile(constraints.of_choice(["x"], "x"))
    words = [" archive", ' {"arguments": 12}', "\n\n", " ", "é", "arguments"]
    for text in words:
        ids = grammars._encode(text.encode())
        assert b"".join(grammars._tokens[token] for token in ids) == text.encode()
        if text[0] == " " and len(text) > 1:
            assert ids == tokenizer.backend.encode(text[1:]).ids
    assert grammars._encode("é".encode()[:1]) is None
    assert grammars._encode(b"<|user|>") is None


def hostile(number=60):
    return constraints.of_json(
        {"allOf": [{"type": "string", "pattern": f".*a{{{count}}}.*"} for count in range(number)]}, "response_format"
    )


@pytest.fixture
def impatient(tokenizer):
    """Gives a grammar half a second of CPU time."""
    made = Grammars(tokenizer.backend, frozenset([2]), seconds=0.5, processes=1)
    yield made
    made.close()


def pids(grammars):
    """Of the processes that try its grammars out."""
    return [one.process.pid for one in grammars._sandboxes._all]


def test_what_takes_too_long_is_given_up(impatient):
    for number in (60, 61):
        with pytest.raises(RequestError, match=r"too complex: it takes more than 0\.5 s of processor time"):
            impatient.compile(hostile(number))
        impatient.compile(constraints.of_choice([f"a{number}"], "x"))


def test_a_busy_machine_changes_no_verdict(impatient):
    """A process that has no CPU for longer than it may use."""
    impatient.compile(constraints.of_choice(["a"], "x"))
    [pid] = pids(impatient)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(0.7, os.kill, (pid, signal.SIGCONT))
    timer.start()
    impatient.compile(constraints.of_choice(["b"], "x"))
    timer.join()
    assert pids(impatient) == [pid]


def test_a_process_that_something_else_ended_is_no_verdict(impatient):
    impatient.compile(constraints.of_choice(["a"], "x"))
    os.kill(pids(impatient)[0], signal.SIGKILL)
    impatient.compile(constraints.of_choice(["b"], "x"))


def test_verdicts_are_kept(impatient, monkeypatch):
    good, bad = constraints.of_choice(["a"], "x"), constraints.of_regex("((", "x")
    assert impatient.known(good) is None
    compiled = impatient.compile(good)
    with pytest.raises(RequestError) as first:
        impatient.compile(bad)
    monkeypatch.setattr(impatient, "_try", None)
    assert impatient.known(good) is impatient.compile(good) is compiled
    with pytest.raises(RequestError, match=re.escape(first.value.message)):
        impatient.known(bad)
    assert impatient.known(constraints.of_choice(["a"], "y")) is None  # its errors would name another field


def test_what_is_kept_has_a_limit():
    kept = _Kept(100)
    for number in range(30):
        kept.put((str(number), ()), RequestError(str(number)), 10)
    kept.put(("0", ()), RequestError("again"), 20)
    assert len(kept._found) == 9
    assert kept._bytes == 100
    assert kept.get(("1", ())) is None
    with pytest.raises(RequestError, match="again"):
        kept.get(("0", ()))


def test_another_keys_grammar_is_compiled_beside_many_that_are_too_complex(tokenizer):
    made = Grammars(tokenizer.backend, frozenset([2]), seconds=0.5, processes=2)

    async def run():
        lane, refused = FairThreadPool("grammars", 2, 1), []

        async def attack(number):
            with pytest.raises(RequestError, match="too complex"):
                await lane.run("attacker", lambda: made.compile(hostile(number)))
            refused.append(number)

        attacks = [asyncio.create_task(attack(number)) for number in range(60, 63)]
        await asyncio.sleep(0)
        await lane.run("other", lambda: made.compile(constraints.of_regex("[0-9]{2}", "x")))
        found = len(refused)
        await asyncio.gather(*attacks)
        lane.close()
        return found

    try:
        assert asyncio.run(run()) <= 1
    finally:
        made.close()
