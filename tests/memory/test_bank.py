"""Banks: the golden vectors, and the properties that the engine relies on."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pacellm import Bank, PAConfig
from pacellm.errors import ConfigError
from pacellm.memory.decode_cpu import DecodedToken, feed
from pacellm.memory.effective_rank import effective_rank
from pacellm.memory.segment import read, stage, write
from pacellm.memory.state import COUNTERS, new_bank, new_stage

DATA = Path(__file__).parent.parent / "data"
GOLDEN = sorted(DATA.glob("*.safetensors"))
PRESETS = ["observe", "reference", "paper"]


def load(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    tensors, meta = load(path)
    config = PAConfig(
        preset=meta["preset"],
        bank_size=int(meta["bank_size"]),
        theta_high=float(meta["theta_high"]),
        theta_low=float(meta["theta_low"]),
    )
    x = tensors["x"]
    inner = torch.nn.functional.silu(x @ tensors["gate"].T) * (x @ tensors["up"].T)
    plain = inner @ tensors["down"].T
    bank = Bank(config, inner_size=inner.shape[1], hidden_size=x.shape[1], dtype=torch.float64)
    outputs, at = [], 0
    for length in tensors["segments"].tolist():
        outputs.append(bank.step(inner[at : at + length], plain[at : at + length]))
        at += length
    assert at == len(x)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(torch.cat(outputs), tensors["y"], **close)
    torch.testing.assert_close(bank.keys, tensors["keys"], **close)
    torch.testing.assert_close(bank.values, tensors["values_projected"], **close)
    torch.testing.assert_close(bank.usage.double(), tensors["usage"].double())
    assert bank.filled == int(tensors["valid"].sum())
    assert [bank.hits, bank.fuses, bank.misses] == tensors["hit_fuse_miss"].tolist()


def data(n, inner=48, hidden=16, seed=0, dtype=torch.float32):
    """Activations with structure, so that hits, fuses and misses all occur."""
    generator = torch.Generator().manual_seed(seed)
    themes = torch.randn(6, inner, generator=generator)
    x = themes[torch.randint(6, (n,), generator=generator)] + 0.9 * torch.randn(n, inner, generator=generator)
    x[::7] = torch.randn(len(x[::7]), inner, generator=generator)
    return x.to(dtype), (x @ torch.randn(inner, hidden, generator=generator)).to(dtype)


def feed_rows(banks, writes, x, y, config, masks=None):
    """[N, H] outputs of one decoded token for each bank, rows of x [N, F] and y [N, H]."""
    masks = masks or [None] * len(banks)
    tokens = zip(banks, writes, [x] * len(banks), range(len(banks)), y, masks, strict=True)
    return torch.stack(feed([DecodedToken(*token) for token in tokens], config))


def run(config, x, y, segment, piece, dtype=torch.float32):
    """Segments of ``segment`` tokens, each fed in pieces of ``piece`` tokens."""
    bank = new_bank(config, x.shape[1], y.shape[1], dtype, torch.device("cpu"))
    staged = new_stage(config, x.shape[1], y.shape[1], dtype, torch.device("cpu"))
    outputs = []
    for start in range(0, len(x), segment):
        stop = min(start + segment, len(x))
        for at in range(start, stop, piece):
            part = slice(at, min(at + piece, stop))
            result = read(bank, x[part], y[part], config)
            stage(staged, result, x[part], config)
            outputs.append(result.output if config.acts else y[part])
        write(bank, staged, config)
    return torch.cat(outputs), bank


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("ties", ["index", "age"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_staged_equals_whole_to_the_bit(preset, ties, dtype):
    config = PAConfig(preset=preset, bank_size=24, theta_high=0.6, theta_low=0.2, ties=ties)
    x, y = data(300, dtype=dtype)
    whole, expected = run(config, x, y, 96, 96, dtype)
    assert expected.counters[:3].min() > 0, "the data must exercise every outcome"
    assert expected.counters[4] > 0
    for piece in (1, 3, 7, 32, 95):
        output, bank = run(config, x, y, 96, piece, dtype)
        assert torch.equal(output, whole)
        for name, mine, theirs in zip(bank._fields, bank, expected, strict=True):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("segment", "piece"), [(96, 32), (1, 1)])
def test_what_is_observed_is_what_reference_does_and_nothing_is_changed(dtype, segment, piece):
    settings = {"bank_size": 24, "theta_high": 0.6, "theta_low": 0.2}
    x, y = data(300, dtype=dtype)
    acting, expected = run(PAConfig(preset="reference", **settings), x, y, segment, piece, dtype)
    plain, bank = run(PAConfig(**settings), x, y, segment, piece, dtype)
    assert torch.equal(plain, y)
    assert not torch.equal(acting, y)
    assert expected.counters[4] > 0
    for name, mine, theirs in zip(bank._fields, bank, expected, strict=True):
        assert torch.equal(mine, theirs), name
    whole = Bank(PAConfig(**settings), inner_size=48, hidden_size=16, dtype=dtype)
    assert torch.equal(whole.step(x, y), y)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_empty_bank_is_the_plain_ffn(preset):
    x, y = data(50)
    bank = Bank(PAConfig(preset=preset, bank_size=64), inner_size=48, hidden_size=16)
    assert torch.equal(bank.step(x, y), y)
    assert (bank.empty, bank.hits, bank.fuses, bank.misses, bank.filled) == (50, 0, 0, 0, 50)
    assert torch.equal(bank.keys[:50], x)
    assert torch.equal(bank.values[:50], y)


def test_a_miss_gives_the_plain_output_to_the_bit():
    bank = Bank(PAConfig(bank_size=4), inner_size=4, hidden_size=3)
    eye, y = torch.eye(4), torch.randn(4, 3)
    bank.step(eye[:2], y[:2])
    assert torch.equal(bank.step(eye[2:], y[2:]), y[2:])
    assert bank.misses == 2


def test_paper_hit_returns_the_memory_alone():
    config = PAConfig(preset="paper", bank_size=4, top_k=1, bottom_k=0)
    bank = Bank(config, inner_size=4, hidden_size=3)
    x, y = torch.eye(4), torch.randn(4, 3)
    bank.step(x, y)
    other = torch.randn(4, 3)
    torch.testing.assert_close(bank.step(x * 2, other), y)
    assert bank.hits == 4
    assert bank.usage.tolist() == [2, 2, 2, 2]


def test_paper_merges_each_token_into_its_own_slots():
    config = PAConfig(preset="paper", bank_size=2, top_k=1, bottom_k=0)
    bank = Bank(config, inner_size=2, hidden_size=1)
    bank.step(torch.eye(2), torch.zeros(2, 1))
    slanted = torch.tensor([[1.0, 1.8], [1.0, 1.7], [3.0, 2.0]])  # cosines .87, .86 to slot 1; .83 to slot 0
    mid = PAConfig(preset="paper", bank_size=2, top_k=1, bottom_k=0, theta_high=0.95)
    bank.config = mid
    bank.step(slanted, torch.zeros(3, 1))
    torch.testing.assert_close(bank.keys[1], 0.5 * torch.tensor([0.0, 1.0]) + 0.5 * slanted[:2].mean(0))
    torch.testing.assert_close(bank.keys[0], 0.5 * torch.tensor([1.0, 0.0]) + 0.5 * slanted[2])
    assert bank.usage.tolist() == [2, 2]


def test_replacement_takes_free_slots_then_the_least_used_then_the_lowest_index():
    config = PAConfig(bank_size=3, theta_low=0.99, theta_high=0.999)
    bank = Bank(config, inner_size=8, hidden_size=1)
    eye = torch.eye(8)
    bank.step(eye[:2], torch.zeros(2, 1))
    bank.step(eye[2:3], torch.zeros(1, 1))
    assert bank.filled == 3
    bank.state.usage.copy_(torch.tensor([5, 1, 1]))
    bank.step(eye[3:4], torch.zeros(1, 1))
    assert bank.keys.argmax(1).tolist() == [0, 3, 2]


def test_age_ties_spread_over_the_slots_and_index_ties_do_not():
    for ties, expected in (("index", 1), ("age", 4)):
        bank = Bank(PAConfig(bank_size=4, ties=ties), inner_size=16, hidden_size=1)
        eye = torch.eye(16)
        bank.step(eye[:4], torch.zeros(4, 1))
        for token in range(4, 8):
            bank.step(eye[token : token + 1], torch.zeros(1, 1))
        assert sum(int(row.argmax()) >= 4 for row in bank.keys) == expected


def test_effective_rank():
    assert effective_rank(torch.zeros(0, 5)) == 0.0
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0)
    assert effective_rank(torch.ones(7, 5)) == pytest.approx(1.0, abs=1e-5)


def test_values_that_cannot_work_are_refused_by_name():
    for wrong in ({"bank_size": 0}, {"theta_low": 0.9, "theta_high": 0.1}, {"alpha": 2.0}, {"preset": "other"}):
        with pytest.raises(ConfigError) as caught:
            PAConfig(**wrong)
        assert caught.value.param in (*wrong, "theta_low")
    with pytest.raises(TypeError):
        PAConfig(unknown=1)
    with pytest.raises(ValueError, match="expected x"):
        Bank(PAConfig(), inner_size=4, hidden_size=2).step(torch.zeros(3, 5), torch.zeros(3, 2))
    assert len(COUNTERS) == 6


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("ties", ["index", "age"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 19])
def test_decoded_tokens_together_equal_segments_of_one_to_the_bit(preset, ties, dtype, count):
    config = PAConfig(preset=preset, bank_size=12, theta_high=0.6, theta_low=0.2, ties=ties)
    tokens = [data(60 + 40 * (number % 2), seed=number, dtype=dtype) for number in range(count)]
    alone = [run(config, x, y, 1, 1, dtype) for x, y in tokens]
    banks = [new_bank(config, 48, 16, dtype, torch.device("cpu")) for _ in tokens]
    for at in range(100):
        going = [number for number in range(count) if at < len(tokens[number][0])]
        if going:
            x, y = (torch.stack([tokens[number][which][at] for number in going]) for which in (0, 1))
            output = feed_rows([banks[number] for number in going], [True] * len(going), x, y, config)
            for row, number in enumerate(going):
                assert not config.acts or torch.equal(output[row], alone[number][0][at])
    for (_, expected), found in zip(alone, banks, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        assert all(found.counters[:2])


def test_decoded_tokens_that_only_read_change_nothing_but_counters():
    config = PAConfig(bank_size=12, theta_high=0.6, theta_low=0.2)
    x, y = data(80)
    _, bank = run(config, x[:60], y[:60], 10, 10)
    before = [tensor.clone() for tensor in bank]
    feed_rows([bank], [False], x[60:61], y[60:61], config)
    assert all(torch.equal(new, old) for new, old in zip(bank[:-1], before[:-1], strict=True))
    assert int((bank.counters - before[-1]).sum()) == 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "numbers",
    [
        {"fuse_weight": 0.3, "negative_weight": 0.07, "momentum": 0.9, "alpha": 0.35, "bottom_k": 3},
        {"top_k": 20, "bottom_k": 20, "negative_weight": -0.3, "alpha": 1.0},
        {"top_k": 1, "bottom_k": 0, "momentum": 0.1, "alpha": 0.7},
    ],
)
def test_layers_and_sequences_fed_together_are_each_alone_to_the_bit(preset, dtype, numbers):
    """Of two sizes, anywhere in a step's rows, beside rows of others."""
    config = PAConfig(preset=preset, bank_size=12, theta_high=0.6, theta_low=0.2, **numbers)
    inputs = [data(70, 48 + 16 * (number % 2), 16 + 8 * (number % 2), number, dtype) for number in range(3)]
    alone = [run(config, x, y, 1, 1, dtype) for x, y in inputs]
    banks = [new_bank(config, x.shape[1], y.shape[1], dtype, torch.device("cpu")) for x, y in inputs]
    for at in range(70):
        tokens = [DecodedToken(bank, True, x, at, y[at]) for bank, (x, y) in zip(banks, inputs, strict=True)]
        for (outputs, _), token, found in zip(alone, tokens, feed(tokens, config), strict=True):
            assert torch.equal(found, outputs[at] if config.acts else token.y)
    for (_, expected), found in zip(alone, banks, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        assert all(found.counters[[0, 1, 4, 5]])


def test_numbers_that_are_none_are_fed_without_a_warning():
    """As one by one: an overflow is the model's own."""
    config = PAConfig(preset="reference", bank_size=12, theta_high=0.6, theta_low=0.2)
    x, y = data(40)
    x[20:23], y[30], x[35] = torch.tensor([[torch.nan], [torch.inf], [3e38]]), -torch.inf, 0.0
    expected, bank = run(config, x, y, 1, 1)
    own = new_bank(config, 48, 16, torch.float32, torch.device("cpu"))
    found = [feed([DecodedToken(own, True, x, at, y[at])], config)[0] for at in range(40)]
    assert torch.equal(torch.stack(found).nan_to_num(), expected.nan_to_num())
    assert all(torch.equal(*(part.nan_to_num() for part in pair)) for pair in zip(own, bank, strict=True))
