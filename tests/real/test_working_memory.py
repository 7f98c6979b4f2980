"""Real models over histories beyond their budget."""

import pytest

from pacellm.demo import real
from pacellm.demo.generator import make_document
from pacellm.llm import LLM
from pacellm.types import Finished, GenerationRequest, Outline, SamplingParams

BUDGET = {"working_memory": 2560, "working_memory_window": 512, "working_memory_index": ("lexical",)}


@pytest.fixture(params=["smollm2", "gemma3-270m"])
def name(request):
    return request.param


def told(llm, prompt, question=None):
    outline = Outline(question=question)
    asked = GenerationRequest("r", prompt, SamplingParams(max_tokens=6, temperature=0, logprobs=0), outline=outline)
    return llm._run([asked])[0]


def test_a_view(name):
    """Within the budget nothing changes by a bit; beyond it the passage with the answer is found and seen."""
    with LLM(name) as plain, LLM(name, **BUDGET) as llm:
        short = plain.tokenizer.encode("The access code of the amber archive is 48213. The opening day of the")
        assert told(llm, short)[1:-1] == told(plain, short)[1:-1]
        document = make_document(3000, 6, 3, llm.tokenizer)
        fact = document.facts[2]
        question = llm.tokenizer.encode(f"\n\n{fact.question}")
        last = told(llm, llm.tokenizer.encode(document.text) + question, (len(question), 0))[-1]
        assert isinstance(last, Finished)
        assert last.memory.resident <= 2560
        first = last.memory.passages[:2]
        assert any(fact.answer in llm.tokenizer.decode(list(one.token_ids)) for one in first)
        assert all(any(a <= one.start and one.end <= b for a, b in last.memory.called_back) for one in first[:1])


def test_the_demo_s_long_document(smollm2, capsys):
    """The server reads it within its budget, and finds most facts for the questions."""
    status = real.show_real("smollm2", str(smollm2), 6000, ["--working-memory-window", "512"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "pacellm serve smollm2 --working-memory 4096" in said
    assert said.count("called back: tokens") == 10
    assert int(said.split("what the model saw in ")[1].split(".")[0]) >= real.ENOUGH
