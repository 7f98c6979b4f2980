"""A calibration tells SmolLM2's harmful layer from a harmless one, and what finds facts from what does not."""

import pytest

from pacellm.calibration.asking import Asking, Moments
from pacellm.calibration.file import text
from pacellm.calibration.gate import LIMIT
from pacellm.calibration.perplexity import Meter
from pacellm.calibration.planted import LEAST, NULLS, facts_of, plant, text_of_facts
from pacellm.calibration.retrieval import shares
from pacellm.calibration.run import PART, STRIDE, effects, perplexity
from pacellm.config import PAConfig
from pacellm.model.load import load
from pacellm.text.tokenizer import ChatTokenizer


def test_layer_28_does_the_harm(smollm2):
    ids = ChatTokenizer(smollm2).encode(text(), add_special_tokens=True)
    assert 3_500 < len(ids) < 4_096
    meter = Meter(load(smollm2), ids[:PART], PAConfig().segment)
    meter.read_plain()
    plain = meter.plain(PART, STRIDE)
    assert 5 < perplexity(plain).decoded < 50
    found = {
        layer: effects(meter.banks(PAConfig().of("reference"), [layer], PART, STRIDE), plain) for layer in (15, 28)
    }
    assert found[15].worst < LIMIT < 1.2 < found[28].worst


@pytest.mark.parametrize("seed", [1, 2])
def test_layer_15_and_the_codes_of_23_find_facts(smollm2, seed):
    tokenizer, model = ChatTokenizer(smollm2), load(smollm2)
    ids = tokenizer.encode(text(), add_special_tokens=True)
    moments, meter = Moments(model), Meter(model, ids[:256], 1024)
    with moments.watching():
        meter.read_plain()
    facts = facts_of(text_of_facts(), tokenizer.encode)[seed * LEAST :][:LEAST]
    nulls = [tokenizer.encode(one) for one in NULLS]
    attention, activity = Asking(model, {23: moments.books()[23]}, nulls).votes(plant(ids, facts, seed=seed))
    for votes in (attention[15], activity[23]):
        assert shares(votes.compared()).own >= 0.75
        assert shares(votes.compared()).both > 3 / LEAST
    assert shares(attention[0].compared()).both < 2 / LEAST
    assert shares(attention[15].compared()).other >= 0.5
