"""Documents read once and asked about from copies, and what a probe sees of an answer."""

import pytest
import torch

from pacellm import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.demo.probe import Probe, copies, divergence, emptied, overwrite, with_random_values
from pacellm.demo.reader import DocumentReader, prompt_of, questions_of
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.model.load import load
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Delta, GenerationRequest, SamplingParams

TOKENIZER = ChatTokenizer(MODEL_PATH)


@pytest.fixture(scope="module")
def reader():
    bank = PAConfig(preset="reference", segment=256)
    config = EngineConfig(kv_cache_memory=2**26, bank=bank, pa_layers=(2, 3), check_integrity=True)
    return DocumentReader(Engine(load(MODEL_PATH), config, TOKENIZER.backend), TOKENIZER)


@pytest.fixture(scope="module")
def document(reader):
    document = make_document(1500, 12, 4, TOKENIZER.backend)
    reader.read(document, "s")
    return document


def test_questions_are_asked_from_copies_of_one_reading(reader, document):
    before = copies(Probe(reader.engine).banks("s"))
    for fact in questions_of(document, 3, 1):
        answer, last = reader.ask(document, fact.question, "s")
        assert answer == fact.answer
        assert last.usage.prompt_tokens - last.usage.cached_tokens < 40
    after = Probe(reader.engine).banks("s")
    assert all(torch.equal(after[layer].keys, bank.keys) for layer, bank in before.items())


def test_a_probe_sees_what_decoding_sees(reader, document):
    prompt = prompt_of(TOKENIZER, document, document.facts[2].question)
    sampling = SamplingParams(max_tokens=24, temperature=0, logprobs=1)
    reader.engine.add(GenerationRequest("x", prompt, sampling, session=("demo", "s"), commit=False))
    deltas = [event for event in run_until_idle(reader.engine)["x"] if isinstance(event, Delta) and event.token_ids]
    decoded = [delta.token_ids[0] for delta in deltas]
    seen = Probe(reader.engine).logprobs(prompt, decoded, "s")
    assert seen.argmax(-1).tolist() == decoded
    found = [float(seen[n, token]) for n, token in enumerate(decoded)]
    assert found == pytest.approx([delta.logprobs[0].logprob for delta in deltas], abs=1e-5)
    reader.engine.parts.integrity.check()


def test_another_bank_in_the_place_of_the_own_one(reader, document):
    probe = Probe(reader.engine)
    prompt = prompt_of(TOKENIZER, document, document.facts[0].question)
    answer = TOKENIZER.encode(document.facts[0].answer)
    mine = copies(probe.banks("s"))
    own = probe.logprobs(prompt, answer, "s")
    assert divergence(own, [own]) == [0.0]
    for banks in (emptied(mine), with_random_values(mine, 0)):
        overwrite(probe.banks("s"), banks)
        assert divergence(own, [probe.logprobs(prompt, answer, "s")])[0] > 0
    overwrite(probe.banks("s"), mine)
    assert torch.equal(probe.logprobs(prompt, answer, "s"), own)
