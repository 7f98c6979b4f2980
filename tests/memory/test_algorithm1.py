"""Every form of the bank's rule in torch does what Algorithm 1 says; tests/triton_cases.py has Triton's."""

import pytest
import torch

from pacellm import PAConfig
from pacellm.config import PRESETS
from pacellm.memory import decode_cpu, decode_device
from pacellm.memory.pool import BankPool, BankShape
from pacellm.memory.tokens import DecodedTokens
from tests.memory.algorithm1 import Algorithm1
from tests.memory.test_bank import GOLDEN, data, load, run

CLOSE = {"rtol": 0, "atol": 1e-9}
# fuse weights that are the same in float32
NUMBERS = (
    {},
    {"ties": "age", "momentum": 0.8, "fuse_weight": 0.375, "bottom_k": 3},
    {"top_k": 3, "bottom_k": 0, "negative_weight": -0.3, "alpha": 0.7},
)
every_rule = pytest.mark.parametrize(("preset", "numbers"), [(name, each) for name in PRESETS for each in NUMBERS])


def config(preset, numbers):
    return PAConfig(**{"preset": preset, "bank_size": 16, "theta_high": 0.6, "theta_low": 0.2, **numbers})


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_algorithm_1_gives_the_golden_vectors(path):
    tensors, meta = load(path)
    names = {"bank_size": int, "theta_high": float, "theta_low": float}
    rule = Algorithm1(PAConfig(preset=meta["preset"], **{name: kind(meta[name]) for name, kind in names.items()}))
    x = tensors["x"]
    inner = torch.nn.functional.silu(x @ tensors["gate"].T) * (x @ tensors["up"].T)
    lengths = tensors["segments"].tolist()
    parts = zip(inner.split(lengths), (inner @ tensors["down"].T).split(lengths), strict=True)
    torch.testing.assert_close(torch.cat([rule.segment(*part) for part in parts]), tensors["y"], **CLOSE)
    assert rule.counts[:3] == tensors["hit_fuse_miss"].tolist()


@every_rule
@pytest.mark.parametrize(("segment", "piece"), [(40, 40), (40, 7)])
def test_segments(preset, numbers, segment, piece):
    rule, (x, y) = Algorithm1(config(preset, numbers)), data(200, dtype=torch.float64)
    expected = torch.cat([rule.segment(*part) for part in zip(x.split(segment), y.split(segment), strict=True)])
    output, bank = run(rule.config, x, y, segment, piece, torch.float64)
    torch.testing.assert_close(output, expected if rule.config.acts else y, **CLOSE)
    rule.assert_holds(bank, **CLOSE)
    assert all(rule.counts), "every outcome must occur"


@every_rule
@pytest.mark.parametrize("form", ["cpu", "device"])
def test_decoded_tokens_are_segments_of_one(preset, numbers, form):
    settings = config(preset, numbers)
    rules = [Algorithm1(settings) for _ in range(2)]
    inputs = [data(120, seed=seed, dtype=torch.float64) for seed in range(2)]
    pool = BankPool(
        settings, [BankShape(0, 48, 16)], num_rows=2, num_stages=1, dtype=torch.float64, device=torch.device("cpu")
    )
    rows, everyone = torch.arange(2), torch.ones(2, dtype=torch.bool)
    told = DecodedTokens(rows, everyone, everyone, torch.full((2,), PRESETS.index(preset)))
    for at in range(120):
        x, y = (torch.stack([pair[which][at] for pair in inputs]) for which in (0, 1))
        if form == "cpu":
            tokens = [decode_cpu.DecodedToken(pool.banks(row)[0], True, x, row, y[row]) for row in range(2)]
            found = torch.stack(decode_cpu.feed(tokens, settings))
        else:
            found = decode_device.feed(pool.arena[0], told, x, y, settings)
        expected = torch.cat([rule.segment(x[row : row + 1], y[row : row + 1]) for row, rule in enumerate(rules)])
        if settings.acts:
            torch.testing.assert_close(found, expected, **CLOSE)
    for row, rule in enumerate(rules):
        rule.assert_holds(pool.banks(row)[0], **CLOSE)
        assert rule.counts[4]
        assert rule.counts[5]
