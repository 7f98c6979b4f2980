"""What decoded tokens attend to of what was called back: against the oracle, and without a trace in the answers."""

import dataclasses

import pytest
import torch

from pacellm import PAConfig
from pacellm.demo.generator import make_document
from pacellm.demo.reader import ask, read
from pacellm.llm import LLM
from pacellm.model.load import prepare
from pacellm.model.retrieval import Retrieval
from pacellm.recall import hits
from pacellm.types import Outline
from pacellm.view import BLOCK
from tests.engine.helpers import new_engine, prompt, request, run, tokens
from tests.models import tiny
from tests.recall import oracle
from tests.recall.test_exactness import ANSWER, SIZES, Story

LAYERS = (1, 2)


@pytest.fixture
def every_turn(monkeypatch):
    monkeypatch.setattr(hits, "_EVERY", 1)


def new(model, **changes):
    watched = dataclasses.replace(prepare(model), retrieval=Retrieval(LAYERS))
    return new_engine(watched, **{**SIZES, "working_memory_index": ("lexical",), **changes})


def test_shares_are_those_of_the_oracle(monkeypatch):
    model, measure, seen = tiny("llama"), hits.HitMeter.measure, []

    def measured(meter, work, asked):
        lot = hits._by_lot(work.sequence.table, work.position)
        for layer in asked.layers:
            found = meter._shares(layer, asked, work.sequence.table, work.place + 1, lot)
            seen.append((layer, work.position, work.sequence.turn.recall, lot, *found))
        return measure(meter, work, asked)

    monkeypatch.setattr(hits.HitMeter, "measure", measured)
    engine, ids = new(model, bank=PAConfig(bank_size=12, segment=64)), prompt(4700)
    answer = tokens(run(engine, request("a", ids, ANSWER, outline=Outline(opening=3)))["a"])
    context, recall, budget, attention = [*ids, *answer][:-1], seen[0][2], engine.config.budget, []
    views = [recall.view(n) if n >= recall.start else budget.reading(n) for n in range(len(context))]
    oracle.logits(model, context, views, attention)
    assert [(layer, position) for layer, position, *_ in seen] == [
        (layer, position) for position in range(4700, 4704) for layer in LAYERS
    ]
    for layer, position, _, lot, called_back, by_lot in seen:
        view = views[position]
        wanted = attention[layer * len(context) + position][:, BLOCK : view.front].sum(-1)
        torch.testing.assert_close((called_back / (1 - by_lot)).double().flatten(), wanted, rtol=1e-3, atol=1e-5)
        assert by_lot.min() > 0
        assert len(lot) * 64 == view.front - BLOCK == 1024
        assert not any(span.start < at + 64 and at < span.end for span in view.spans for at in lot)
        assert max(lot) + 64 <= view.start
    total = engine.parts.scheduling.recaller.hits.total
    assert total.tokens == 4
    assert total.called_back == pytest.approx(sum(float(one[4].mean()) for one in seen) / len(LAYERS), rel=1e-5)
    assert total.by_lot == pytest.approx(sum(float(one[5].mean()) for one in seen) / len(LAYERS), rel=1e-5)


def test_answers_are_the_same_watched_or_not(every_turn):
    model = tiny("llama")
    alone, engine = Story(new_engine(prepare(model), **SIZES)).found, new(model)
    assert Story(engine).found == alone
    assert engine.parts.scheduling.recaller.hits.total.tokens > 10


def test_a_sample_is_watched_and_a_document_that_fits_is_not():
    model = tiny("llama")
    engine = new(model)
    total = engine.parts.scheduling.recaller.hits.total
    run(engine, request("short", prompt(700), ANSWER, outline=Outline(opening=3)))
    assert total.tokens == 0
    for number in range(9):
        run(engine, request(f"r{number}", prompt(4700), ANSWER, outline=Outline(opening=3)))
    assert total.tokens == 2 * 4, "the first and the ninth"


def test_called_back_facts_get_far_more_than_blocks_by_lot(every_turn):
    with LLM(working_memory=2560, working_memory_window=512) as llm:
        document = make_document(9000, 12, 77, llm.tokenizer)
        read(llm, document, "s")
        for fact in document.facts[2:7]:
            assert str(ask(llm, document, fact.question, "s")) == fact.answer
        total = llm.engine.parts.scheduling.recaller.hits.total
    assert total.tokens >= 5
    assert total.called_back / total.tokens > 0.2
    assert total.called_back > 10 * total.by_lot
