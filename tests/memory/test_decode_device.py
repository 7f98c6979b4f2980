"""Decoded tokens by masks and indices: the same as one by one, with nothing that waits, and the same in Triton."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pacellm import PAConfig
from pacellm.config import PRESETS
from pacellm.memory import decode_device
from pacellm.memory.pool import BankPool, BankShape
from pacellm.memory.tokens import DecodedTokens
from tests.memory.test_bank import data, feed_rows

INNER, HIDDEN, ROWS = 48, 16, 6
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "_unique2")


class NoWaiting(TorchDispatchMode):
    """Fails on operations that wait for a device: those whose result's value or size the host must know."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in WAITING, f"{function} waits for the device"
        if function.overloadpacket.__name__ == "index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as index"
        return function(*args, **(kwargs or {}))


def new_pool(config, dtype=torch.float32, device="cpu"):
    shape = [BankShape(0, INNER, HIDDEN)]
    return BankPool(config, shape, num_rows=ROWS, num_stages=2, dtype=dtype, device=torch.device(device))


def config(**changes):
    return PAConfig(**{"preset": "reference", "bank_size": 12, "theta_high": 0.6, "theta_low": 0.3, **changes})


def turns(count, dtype=torch.float32):
    """For each decode step: rows in some order, whether each lives and writes, and activations."""
    generator = torch.Generator().manual_seed(3)
    x, y = data(count * ROWS, INNER, HIDDEN, seed=1, dtype=dtype)
    for number in range(count):
        rows = torch.randperm(ROWS, generator=generator)[: 1 + number % ROWS]
        mine = slice(number * ROWS, number * ROWS + len(rows))
        yield rows, torch.rand(len(rows), generator=generator) < 0.9, x[mine], y[mine]


def told(rows, writes, preset, sets=None):
    """Tokens that all live, of one preset."""
    presets = torch.full_like(rows, PRESETS.index(preset))
    return DecodedTokens(rows, torch.ones_like(writes), writes, presets, sets)


def assert_same_rows(mine, theirs, close=None):
    for name, one, other in zip(mine._fields, mine, theirs, strict=True):
        assert one.shape == other.shape
        same = torch.equal(one[:ROWS], other[:ROWS])
        if close is not None and one.is_floating_point():
            torch.testing.assert_close(one[:ROWS], other[:ROWS], **close, msg=name)
        else:
            assert same, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["index", "age"])
@pytest.mark.parametrize("preset", PRESETS)
def test_masked_equals_one_by_one_to_the_bit(preset, ties, dtype):
    settings = config(preset=preset, ties=ties)
    mine, theirs = new_pool(settings, dtype), new_pool(settings, dtype)
    arena = mine.arena[0]
    for rows, writes, x, y in turns(60, dtype):
        banks = [theirs.banks(row)[0] for row in rows.tolist()]
        expected = feed_rows(banks, writes.tolist(), x, y, settings)
        # padding and a token that was fed in vain stand beside them
        tokens = DecodedTokens(
            rows=torch.cat([rows, torch.full((3,), mine.scratch_row)]),
            live=torch.cat([torch.ones_like(rows, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)]),
            writes=torch.cat([writes, torch.ones(3, dtype=torch.bool)]),
            presets=torch.full((len(rows) + 3,), PRESETS.index(preset)),
        )
        extra_x, extra_y = data(3, INNER, HIDDEN, seed=99, dtype=dtype)
        found = decode_device.feed(arena, tokens, torch.cat([x, extra_x]), torch.cat([y, extra_y]), settings)
        if settings.acts:
            assert torch.equal(found[: len(rows)], expected)
    assert_same_rows(arena, theirs.arena[0])
    counters = arena.counters[:ROWS].sum(0)
    assert counters.gt(0).all(), "every outcome must occur"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["index", "age"])
def test_presets_side_by_side_are_each_alone_to_the_bit(ties, dtype):
    settings = PAConfig(bank_size=12, ties=ties)
    mine, theirs = new_pool(settings, dtype), new_pool(settings, dtype)
    arena = mine.arena[0]
    for rows, writes, x, y in turns(60, dtype):
        presets = rows % len(PRESETS)
        tokens = DecodedTokens(rows, torch.ones_like(writes), writes, presets)
        found = decode_device.feed(arena, tokens, x, y, settings)
        assert tokens.acts.tolist() == [row % 3 > 0 for row in rows.tolist()]
        for number, row in enumerate(rows.tolist()):
            one, part = settings.of(PRESETS[presets[number]]), slice(number, number + 1)
            alone = feed_rows([theirs.banks(row)[0]], [bool(writes[number])], x[part], y[part], one)
            assert not one.acts or torch.equal(found[number], alone[0])
    assert_same_rows(arena, theirs.arena[0])
    assert arena.counters[:ROWS].sum(0).gt(0).all(), "every outcome must occur"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sets_by_row_are_masks(dtype):
    settings = config()
    mine, theirs = new_pool(settings, dtype), new_pool(settings, dtype)
    arena, table = mine.arena[0], new_sets()
    for rows, writes, x, y in turns(30, dtype):
        masks = [table[row].repeat_interleave(INNER // table.shape[1]) for row in rows.tolist()]
        x = x * torch.stack(masks)
        banks = [theirs.banks(row)[0] for row in rows.tolist()]
        expected = feed_rows(banks, writes.tolist(), x, y, settings, masks=masks)
        tokens = told(rows, writes, settings.preset, rows)
        assert torch.equal(decode_device.feed(arena, tokens, x, y, settings, table), expected)
    assert_same_rows(arena, theirs.arena[0])


def new_sets():
    """[ROWS, 6] bool, other sets than full ones."""
    return torch.rand(ROWS, 6, generator=torch.Generator().manual_seed(7)) < 0.6


def test_a_token_that_does_not_live_changes_nothing():
    settings = config()
    pool = new_pool(settings)
    arena = pool.arena[0]
    for rows, writes, x, y in turns(20):
        decode_device.feed(arena, told(rows, writes, settings.preset), x, y, settings)
    before = [tensor.clone() for tensor in arena]
    x, y = data(ROWS, INNER, HIDDEN, seed=50)
    nobody = torch.zeros(ROWS, dtype=torch.bool)
    decode_device.feed(
        arena, DecodedTokens(torch.arange(ROWS), nobody, ~nobody, torch.arange(ROWS) * 0), x, y, settings
    )
    assert_same_rows(arena, type(arena)(*before))


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_waits_for_the_device(preset, monkeypatch):
    """On CPU the two products are done row by row; the form of a device takes their place here."""
    settings = config(preset=preset)
    arena = new_pool(settings).arena[0]
    monkeypatch.setattr(
        decode_device, "_cosines", lambda keys, rows, x, masks, total: _device_cosines(keys, rows, x, masks)
    )
    monkeypatch.setattr(decode_device, "_recall", lambda w, values, rows: torch.bmm(w[:, None], values[rows])[:, 0])
    for rows, writes, x, y in turns(12):
        with NoWaiting():
            decode_device.feed(arena, told(rows, writes, preset, rows), x, y, settings, new_sets())


def _device_cosines(keys, rows, x, masks):
    own = keys[rows] * masks[:, None]
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True) * torch.linalg.vector_norm(own, dim=2)
    return torch.bmm(own, x[:, :, None])[:, :, 0] / lengths.clamp(min=1e-12)
