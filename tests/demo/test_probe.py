"""Documents read once and asked about from copies, and what a probe sees of an answer."""

import pytest
import torch

from pacellm import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.demo.probe import Probe, copies, divergence, emptied, overwrite, with_random_values
from pacellm.demo.reader import ask, prompt_of, questions_of, read
from pacellm.llm import LLM
from pacellm.text.tokenizer import ChatTokenizer

TOKENIZER = ChatTokenizer(MODEL_PATH)


@pytest.fixture(scope="module")
def llm():
    bank = PAConfig(preset="reference", segment=256)
    config = EngineConfig(kv_cache_memory=2**26, bank=bank, pa_layers=(2, 3), check_integrity=True)
    return LLM(config=config)


@pytest.fixture(scope="module")
def document(llm):
    document = make_document(1500, 12, 4, TOKENIZER.backend)
    read(llm, document, "s")
    return document


def test_questions_are_asked_from_copies_of_one_reading(llm, document):
    before = copies(Probe(llm.engine).banks("s"))
    for fact in questions_of(document, 3, 1):
        answer = ask(llm, document, fact.question, "s")
        assert answer.text == fact.answer
        assert answer.usage.prompt_tokens - answer.usage.cached_tokens < 40
    after = Probe(llm.engine).banks("s")
    assert all(torch.equal(after[layer].keys, bank.keys) for layer, bank in before.items())


def test_a_probe_sees_what_decoding_sees(llm, document):
    prompt = prompt_of(TOKENIZER, document, document.facts[2].question)
    answer = llm.generate([prompt], session="s", commit=False, max_tokens=24, temperature=0, logprobs=1)[0]
    decoded = list(answer.token_ids)
    seen = Probe(llm.engine).logprobs(prompt, decoded, "s")
    assert seen.argmax(-1).tolist() == decoded
    found = [float(seen[n, token]) for n, token in enumerate(decoded)]
    assert found == pytest.approx([one.logprob for one in answer.logprobs], abs=1e-5)
    llm.engine.parts.integrity.check()


def test_another_bank_in_the_place_of_the_own_one(llm, document):
    probe = Probe(llm.engine)
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
