"""Triton kernels beside what they stand for; tests/test_triton.py runs this file under Triton's interpreter."""

import pytest
import torch

from pacellm.memory import feed, feed_triton
from pacellm.model import decode_triton
from pacellm.model.context import DecodeRows, Shared
from tests.memory.test_feed import ROWS, assert_same_rows, config, new_pool, turns


@pytest.mark.parametrize(("preset", "ties"), [("reference", "index"), ("paper", "age")])
def test_feed(preset, ties):
    """Some steps in torch fill the banks; then steps of all rows, side by side."""
    settings = config(preset=preset, ties=ties, bank_size=10, top_k=3)
    mine, theirs = new_pool(settings).arena[0], new_pool(settings).arena[0]
    for number, (rows, writes, x, y) in enumerate(turns(30)):
        tokens = feed.Tokens(rows, torch.ones_like(writes), writes)
        if number in (17, 29):
            tokens.live[0] = False
            before = mine.counters[:ROWS].sum(0)
            expected = feed.feed(theirs, tokens, x, y, settings)
            found = feed_triton.feed(mine, tokens, x, y, settings)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (mine.counters[:ROWS].sum(0) > before).any()
        else:
            for arena in (mine, theirs):
                feed.feed(arena, tokens, x, y, settings)
    assert_same_rows(mine, theirs, close={"rtol": 1e-4, "atol": 1e-4})
    assert mine.counters[:ROWS].sum(0).gt(0).sum() >= 5


def decode_rows(lengths, tables, shared=None):
    """A decode step's rows, without banks."""
    nothing = torch.zeros(len(lengths), dtype=torch.bool)
    tokens = feed.Tokens(torch.zeros(len(lengths), dtype=torch.int64), nothing, nothing)
    slots = torch.zeros(len(lengths), dtype=torch.int64)
    return DecodeRows(slots, torch.tensor(lengths, dtype=torch.int32), tables, tokens, shared)


def plain(query, keys, values, table, first, length, scale):
    """One sequence's attention in float64: [H, D]."""
    slots = torch.tensor([int(table[p // 512]) + p % 512 for p in range(first, length)])
    group = query.shape[0] // keys.shape[0]
    own_keys, own_values = (slab[:, slots].double().repeat_interleave(group, 0) for slab in (keys, values))
    scores = (query[:, None].double() @ own_keys.transpose(1, 2)) * scale
    return (scores.softmax(-1) @ own_values)[:, 0]


@pytest.mark.parametrize("window", [None, 100])
def test_decode_attention(window):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 3, 24, generator=generator)
    keys, values = (torch.randn(2, 4 * 512, 24, generator=generator) for _ in range(2))
    tables = torch.tensor([[512, 0], [1536, 0], [1024, 512]], dtype=torch.int32)
    lengths = [130, 1, 700]
    found = decode_triton.attend(query, keys, values, decode_rows(lengths, tables), 0.3, window, splits=3)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        expected = plain(query[:, row], keys, values, tables[row], first, length, 0.3)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_beginning_is_read_once():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 4, 16, generator=generator)
    keys, values = (torch.randn(2, 5 * 512, 16, generator=generator) for _ in range(2))
    tables = torch.tensor([[512, 0], [1536, 0], [512, 1024], [512, 2048]], dtype=torch.int32)
    lengths = [600, 90, 530, 513]  # 0, 2 and 3 share their first block
    shared = Shared(
        members=torch.tensor([[-1, -1, -1], [0, 2, 3]], dtype=torch.int32),
        leader=torch.tensor([0, 2], dtype=torch.int32),
        lengths=torch.tensor([0, 512], dtype=torch.int32),
        group=torch.tensor([1, 0, 1, 1]),
    )
    found = decode_triton.attend(query, keys, values, decode_rows(lengths, tables, shared), 0.3, None, splits=2)
    for row, length in enumerate(lengths):
        expected = plain(query[:, row], keys, values, tables[row], 0, length, 0.3)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)
