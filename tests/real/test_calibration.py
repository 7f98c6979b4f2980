"""A calibration tells SmolLM2's harmful layer from a harmless one."""

from pacellm.calibration.file import text
from pacellm.calibration.gate import LIMIT
from pacellm.calibration.perplexity import Meter
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
