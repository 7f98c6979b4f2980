"""The down-projection with banks by itself: decoded tokens of layers that only observe are fed at the end of a step."""

import pytest
import torch

from pacellm import PAConfig
from pacellm.config import PRESETS
from pacellm.memory.state import new_bank
from pacellm.model.context import Banks, Chunk, Piece, StepContext, step_context
from pacellm.model.ffn import PersistentDown, observe
from tests.memory.test_bank import data, run

CONFIG = PAConfig(bank_size=12, theta_high=0.6, theta_low=0.2)
SIZES = {0: (48, 16), 3: (64, 24)}


def replayed(banks, start, count, preset):
    """A sequence's ``count`` decoded tokens from row ``start``, as where a log is replayed."""
    pieces = tuple(Piece(row, row + 1, True) for row in range(start, start + count))
    return Chunk(start, start + count, 0, (), pieces, Banks(banks, {}, preset), num_decoded=count)


@pytest.mark.parametrize("presets", [PRESETS, ("observe",)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_decoded_tokens_of_all_layers_are_segments_of_one(has_bias, presets):
    """Of a sequence under each preset in one step, though the model adds to its outputs in place."""
    torch.manual_seed(0)
    starts, counts = {"observe": 0, "reference": 50, "paper": 80}, {"observe": 50, "reference": 30, "paper": 40}
    downs = {layer: PersistentDown(torch.nn.Linear(*size, bias=has_bias), layer) for layer, size in SIZES.items()}
    banks = {
        preset: {layer: new_bank(CONFIG, *size, torch.float32, torch.device("cpu")) for layer, size in SIZES.items()}
        for preset in presets
    }
    step = StepContext([replayed(banks[name], starts[name], counts[name], name) for name in presets], [], [], CONFIG)
    inputs, outputs, plain = {}, {}, {}
    with torch.inference_mode(), step_context(step):
        for layer, down in downs.items():
            inputs[layer] = data(120, SIZES[layer][0], seed=layer)[0]
            plain[layer] = down.original(inputs[layer])
            found = down(inputs[layer][None])[0]
            outputs[layer] = found.clone()
            found.add_(1.0)
        observe(step)
    for layer, down in downs.items():
        for name in presets:
            rows = slice(starts[name], starts[name] + counts[name])
            y = plain[layer][rows] if down.bias is None else plain[layer][rows] - down.bias
            config = CONFIG.of(name)
            expected, bank = run(config, inputs[layer][rows], y, 1, 1)
            if down.bias is not None and config.acts:
                expected = expected + down.bias
            assert torch.equal(outputs[layer][rows], expected if config.acts else plain[layer][rows])
            assert all(torch.equal(*pair) for pair in zip(banks[name][layer], bank, strict=True))
            assert bank.counters[:3].all()
