"""Histories beyond the model's budget over HTTP."""

import dataclasses

import pytest
import torch

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.engine.engine import Engine
from pacellm.llm import LLM
from pacellm.model.load import load
from pacellm.model.neurons import ffns
from pacellm.model.retrieval import CodeBook, Retrieval
from pacellm.server.service import Service
from pacellm.server.settings import Settings
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.conftest import NAME, Live

BUDGET = 2560


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(MODEL_PATH)


@pytest.fixture(scope="module")
def server(tokenizer):
    config = EngineConfig(
        working_memory=BUDGET, working_memory_window=512, working_memory_index=("lexical",), max_model_len=20_000
    )
    engine = Engine(load(MODEL_PATH), config, tokenizer.backend)
    with Live(Service(engine, tokenizer, Settings(model_name=NAME))) as live:
        yield live


@pytest.fixture(scope="module")
def document(tokenizer):
    return make_document(8000, 12, 5, tokenizer)


def ask(server, content, **options):
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24, **options}
    return server.http.post("/v1/chat/completions", json=body)


def test_a_document_and_its_question_in_one_message(server, document):
    fact = document.facts[4]
    told = ask(server, f"{document.text}\n\n{fact.question}").json()
    assert told["choices"][0]["message"]["content"] == fact.answer
    assert 7900 < told["usage"]["prompt_tokens"] < 8200
    memory = told["pacellm"]["memory"]
    assert memory["view"]
    assert memory["budget_tokens"] == BUDGET
    assert memory["resident_tokens"] <= BUDGET
    best = memory["passages"][0]
    assert fact.answer in best["text"] + memory["passages"][1]["text"]
    for one in memory["passages"]:
        place = one["in"]
        assert place["message"] == 0
        assert f"{document.text}\n\n{fact.question}"[place["start"] : place["end"]] == one["text"].strip("\ufffd")
    assert (best["index"], best["end"] - best["start"]) == ("lexical", 64)
    assert memory["called_back"][0] == [0, 512]
    assert sum(end - start for start, end in memory["called_back"]) == 1024


def test_questions_by_append_streamed_and_by_responses(server, document):
    ask(server, f"{document.text}\n\n{document.facts[0].question}", session_id="w")
    shown = server.http.get("/v1/sessions/w").json()
    assert shown["bytes"]["history"] > 0
    for fact in document.facts[1:9:3]:
        server.http.post("/v1/sessions/w/fork", json={"session_id": "x"})
        told = ask(server, fact.question, session_id="x", pacellm={"append": True}).json()
        assert told["choices"][0]["message"]["content"] == fact.answer
        assert not any("in" in one for one in told["pacellm"]["memory"]["passages"]), "they were not sent now"
        server.http.delete("/v1/sessions/x")
    stream = server.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": f"{document.text}\n\n{fact.question}"}], stream=True,
        temperature=0, max_tokens=24,
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == fact.answer
    answer = server.client.responses.create(model=NAME, input=f"{document.text}\n\n{fact.question}", temperature=0)
    assert answer.output_text == fact.answer
    metrics = server.http.get("/metrics").text
    assert 'pacellm_session_bytes{kind="history",model_name="pacellm-demo",tier="host"}' in metrics
    recalls = next(line for line in metrics.splitlines() if line.startswith("pacellm_recalls_total"))
    assert float(recalls.split()[-1]) >= 5


def test_passages_stand_in_prompts_and_in_items_of_an_input(server, document):
    question = document.facts[4].question
    prompts = ["A first one.", f"{document.text}\n\n{question}"]
    told = server.http.post("/v1/completions", json={"prompt": prompts, "max_tokens": 4}).json()
    items = [{"role": "user", "content": document.text}, {"role": "assistant", "content": "I have read it."},
             {"role": "user", "content": question}]  # fmt: skip
    answer = server.http.post("/v1/responses", json={"input": items, "max_output_tokens": 4}).json()
    for name, texts, passages in (
        ("prompt", prompts, told["choices"][1]["pacellm"]["memory"]["passages"]),
        ("input", [item["content"] for item in items], answer["pacellm"]["memory"]["passages"]),
    ):
        assert passages
        for one in passages:
            place = one["in"]
            assert texts[place[name]][place["start"] : place["end"]] == one["text"].strip("\ufffd"), name


def test_over_a_restart_on_little_host_memory(tokenizer, document, tmp_path):
    """Its history is on disk block by block, and nothing is read again."""
    config = EngineConfig(
        working_memory=BUDGET, working_memory_window=512, working_memory_index=("lexical",), max_model_len=20_000,
        session_dir=str(tmp_path), session_host_memory=2**22,
    )  # fmt: skip
    fact = document.facts[5]
    for found in ("new", "restored"):
        engine = Engine(load(MODEL_PATH), config, tokenizer.backend)
        with Live(Service(engine, tokenizer, Settings(model_name=NAME))) as server:
            append = found != "new"
            told = ask(server, fact.question if append else document.text, session_id="s", pacellm={"append": append})
            assert told.json()["pacellm"]["session"] == found
            metrics = server.http.get("/metrics").text
            line = 'pacellm_session_bytes{kind="history",model_name="pacellm-demo",tier="%s"} '
            host, disk = (float(metrics.split(line % tier)[1].split()[0]) for tier in ("host", "disk"))
            assert host <= 2**22 < disk
            assert server.http.get("/v1/sessions/s").json()["bytes"]["disk"] >= (disk if append else 0)
        engine.close()
    assert told.json()["choices"][0]["message"]["content"] == fact.answer


def test_what_fits_its_budget_sees_everything(server):
    memory = ask(server, "hello").json()["pacellm"]["memory"]
    assert (memory["view"], memory["called_back"], memory["passages"]) == (False, [], [])


def test_memory_off_ends_at_the_budget(server, document):
    told = ask(server, document.text, pacellm={"memory": "off"})
    assert (told.status_code, told.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert ask(server, "hello", pacellm={"memory": "off"}).status_code == 200


def test_beyond_the_history_is_refused_with_its_length(server, document):
    told = ask(server, 3 * document.text)
    assert (told.status_code, told.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "20,000" in told.json()["error"]["message"]
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 20_000


def test_scores_of_a_prompt_beyond_the_budget_are_refused(server, document):
    body = {"prompt": document.text, "echo": True, "logprobs": 0, "max_tokens": 0}
    told = server.http.post("/v1/completions", json=body)
    assert (told.status_code, told.json()["error"]["param"]) == (400, "echo")


def test_a_completion_beyond_the_budget(server, document):
    body = {"prompt": document.text, "max_tokens": 4, "temperature": 0}
    told = server.http.post("/v1/completions", json=body).json()
    assert told["pacellm"]["memory"]["view"]


def test_it_is_asked_for_where_it_is_not_there(live):
    told = live.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "pacellm": {"memory": "on"}}
    )
    assert (told.status_code, told.json()["error"]["param"]) == (400, "pacellm.memory")


def test_codes_of_another_calibration_are_not_compared(tokenizer, tmp_path):
    """State on disk has them beside its KV: a session that is written under one is read again under another."""
    model = load(MODEL_PATH)
    size = ffns(model.module)[1].inner
    found = []
    for seed in (0, 0, 1):
        book = CodeBook(1, torch.zeros(size), torch.ones(size), seed=seed)
        with LLM(
            dataclasses.replace(model, retrieval=Retrieval(book=book)), tokenizer=tokenizer, session_dir=str(tmp_path),
            working_memory=BUDGET, working_memory_window=512, working_memory_index=("activity",),
        ) as llm:  # fmt: skip
            if not found:
                llm.chat("The access code of the amber archive is 48213.", session="s", max_tokens=0)
            found.append(llm.generate(["hello"], session="s", commit=False, max_tokens=1)[0].session)
    assert found == ["resident", "restored", "replayed"]
