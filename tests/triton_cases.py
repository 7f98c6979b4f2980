"""Triton kernels beside what they stand for; tests/test_triton.py runs this file under Triton's interpreter."""

import pytest
import torch

from pacellm.memory import feed, feed_triton
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
