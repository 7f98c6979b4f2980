"""Which blocks come back for given votes."""

import numpy as np

from pacellm.recall.recaller import chosen
from pacellm.view import Span

FIRST = 8  # blocks of 64 that are seen in any case


def votes(**by_block):
    found = np.zeros(60)
    for name, vote in by_block.items():
        found[int(name[1:])] = vote
    return found


def test_one_answer_comes_with_what_stands_around_it():
    assert chosen([votes(b30=20.0, b12=7.0)], [0.5], 512, 64) == (Span(0, 512), Span(28 * 64, 512))


def test_equals_share():
    spans = chosen([votes(b20=4.0, b40=3.0)], [0.5], 512, 64)
    assert sum(span.length for span in spans) == 1024
    assert chosen([votes(b20=4.0, b40=3.0)], [0.9], 512, 64) == chosen([votes(b20=4.0)], [0.9], 512, 64)
    assert {20, 21, 40, 41} <= {block for span in spans for block in range(span.start // 64, span.end // 64)}


def test_what_is_seen_in_any_case_is_not_in_the_running():
    assert chosen([votes(b2=90.0, b30=4.0)], [0.5], 512, 64) == chosen([votes(b30=4.0)], [0.5], 512, 64)


def test_two_indexes_take_turns():
    spans = chosen([votes(b20=1.0), votes(b50=0.1)], [0.9, 0.5], 512, 64)
    assert [span.length for span in spans] == [512, 256, 256]


def test_no_votes_and_large_blocks_still_fill_the_room():
    for block in (64, 512):
        spans = chosen([np.zeros(60)], [0.9], 512, block)
        assert sum(span.length for span in spans) == 1024
