"""What tokens see beyond the budget is what the rule says, however the work is cut."""

import pytest
import torch

from pacellm import PAConfig
from pacellm.model.load import prepare
from pacellm.types import Delta, Outline, SamplingParams
from tests.engine.helpers import new_engine, prompt, request, run_until_idle, tokens
from tests.models import tiny
from tests.recall import oracle

SIZES = {"working_memory": 2560, "working_memory_window": 512, "working_memory_recall": 1024, "max_model_len": 50_000}
SCORED = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)


def engine(model, **changes):
    changes = {"bank": PAConfig(bank_size=12, segment=64), **SIZES, **changes}
    return new_engine(prepare(model), **changes)


def scores(events):
    return [one.logprob for event in events if isinstance(event, Delta) for one in event.logprobs]


def test_logprobs_are_those_of_dense_attention_over_the_view():
    model, ids = tiny("llama"), prompt(4700)
    served = engine(model)
    seen = {}
    recaller = served.parts.scheduling.recaller
    choose = recaller.choose
    recaller.choose = lambda sequence, *asked: seen.update(recall=choose(sequence, *asked))
    served.add(request("a", ids, SCORED, outline=Outline(opening=3)))
    events = run_until_idle(served)["a"]
    recall, fed = seen["recall"], [*ids, *tokens(events)][:-1]
    assert recall.start == 4700 - 3 - 128
    assert sum(span.length for span in recall.spans) == 2560 - 512 - 512
    budget = served.config.budget
    views = [recall.view(p) if p >= recall.start else budget.reading(p) for p in range(len(fed))]
    found = oracle.logits(model, fed, views)[len(ids) - 1 :].log_softmax(-1)
    wanted = [float(row[token]) for row, token in zip(found, tokens(events), strict=True)]
    assert scores(events) == pytest.approx(wanted, abs=2e-4)
    assert torch.equal(found.argmax(-1), torch.tensor(tokens(events)))
