"""The offline front door on the bundled model."""

import pytest
import torch

from pacellm import LLM, SamplingParams
from pacellm.errors import ConfigError, EngineError, RequestError, SessionNotFound
from pacellm.types import FinishReason

FACT = "The access code of the harbor archive is 52273."
QUESTION = "What is the access code of the harbor archive?"
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    with LLM(kv_cache_memory=2**26, max_model_len=2048, check_integrity=True) as llm:
        yield llm


def test_prompts_that_run_together_are_answered_as_alone(llm):
    prompts = [FACT, "The keeper of the", llm.tokenizer.encode("In the garden")]
    together = llm.generate(prompts, GREEDY, logprobs=1, ignore_eos=True)
    alone = [llm.generate(prompt, GREEDY, ignore_eos=True)[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert all(len(answer.logprobs) == len(answer.token_ids) == 12 for answer in together)
    assert together[0].reason is FinishReason.LENGTH
    assert llm.generate([]) == []


def test_a_session_goes_on(llm):
    assert llm.chat(FACT, session="a", max_tokens=0).text == ""
    answer = llm.chat(QUESTION, GREEDY, session="a", append=True)
    assert str(answer).startswith("52273")
    assert answer.session == "resident"
    assert answer.usage.cached_tokens > 0
    whole = [{"role": "user", "content": FACT}, {"role": "user", "content": QUESTION}]
    assert llm.chat(whole, GREEDY).text == answer.text


def test_a_stream_is_the_answer(llm):
    llm.chat(FACT, session="streamed", max_tokens=0)
    with llm.stream(QUESTION, GREEDY, session="streamed", append=True) as stream:
        text = "".join(stream)
    assert stream.answer.text == text
    assert text.startswith("52273")
    assert llm.show("streamed")["commits"] == 2


def test_a_stream_that_is_left_leaves_nothing(llm):
    llm.chat(FACT, session="left", max_tokens=0)
    before = llm.show("left")
    with llm.stream("In the garden", session="left", append=True, max_tokens=40) as stream:
        next(stream)
    assert not llm.engine.has_work
    after = llm.show("left")
    assert (after["tokens"], after["commits"]) == (before["tokens"], before["commits"])
    assert llm.chat(QUESTION, GREEDY, session="left", append=True).text.startswith("52273")


def test_forks_go_on_by_themselves(llm):
    llm.chat(FACT, session="root", max_tokens=0)
    llm.fork("root", "branch")
    assert llm.chat(QUESTION, GREEDY, session="branch", append=True).text.startswith("52273")
    assert llm.show("root")["commits"] == 1
    llm.delete("branch")
    with pytest.raises(SessionNotFound):
        llm.show("branch")


def test_banks_are_tensors_and_frames(llm):
    llm.chat(f"{FACT} " * 30, session="banked", max_tokens=0)
    banks = llm.banks("banked")
    held = llm.engine.pool.banks(llm.engine.sessions.get(("offline", "banked")).row)
    for layer, bank in banks.items():
        assert torch.equal(bank.keys, held[layer].keys)
        assert bank.keys.data_ptr() != held[layer].keys.data_ptr()
    frame, reads = llm.frame("banked"), llm.reads("banked")
    assert list(frame.groupby("layer").size()) == [int(bank.filled) for bank in banks.values()]
    assert list(reads.index) == list(banks)
    assert int(reads.to_numpy().sum()) == sum(int(bank.counters.sum()) for bank in banks.values())


def test_what_cannot_be_is_said(llm):
    with pytest.raises(RequestError, match="one prompt at a time"):
        llm.generate(["a", "b"], session="a")
    with pytest.raises(RequestError, match="name one"):
        llm.chat("a", append=True)
    with pytest.raises(SessionNotFound):
        llm.banks("nobody's")
    with pytest.raises(RequestError, match="temperature"):
        llm.generate("a", temperature=9)
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(llm.engine.model)
    with LLM(kv_cache_memory=2**26, max_model_len=2048, pa=False) as plain:
        plain.chat(FACT, session="a", max_tokens=0)
        with pytest.raises(EngineError, match="pa=False"):
            plain.banks("a")
