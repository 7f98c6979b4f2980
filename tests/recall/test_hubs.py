"""Votes count by how much they differ from those for questions about other things."""

import gc

import numpy as np
import pytest
import torch

from pacellm.kv.history import History, HistoryBlock
from pacellm.model.context import Asked
from pacellm.model.retrieval import CodeBook, Nulls, Retrieval
from pacellm.recall.activity import activity_votes, differing_bits, votes_by_bits
from pacellm.recall.hubs import NullBits, without_hubs
from pacellm.recall.recaller import Recaller
from pacellm.view import BLOCK

RANDOM = np.random.default_rng(0)
BOOK = CodeBook(0, torch.zeros(8), torch.ones(8), bits=64)


def codes(count):
    return RANDOM.integers(0, 256, (count, 8), dtype=np.uint8)


def block(keys=None, own=None):
    keys = torch.zeros(1, BLOCK, 4) if keys is None else keys
    return HistoryBlock([keys, keys, torch.from_numpy(codes(BLOCK) if own is None else own)[None]])


def test_by_how_many_times_a_vote_is_more():
    votes, nulls = np.array([4.0, 4.0, 1.0]), [np.array([1.0, 8.0, 1.0]), np.array([4.0, 2.0, 1.0])]
    assert without_hubs(votes, nulls) == pytest.approx([2.0, 1.0, 1.0])
    assert without_hubs(votes, []) is votes
    assert without_hubs(np.stack([votes, votes]), np.stack(nulls)).tolist() == [without_hubs(votes, nulls).tolist()] * 2
    assert np.isfinite(without_hubs(np.zeros(3), [np.zeros(3)])).all()


def test_likeness_of_blocks():
    asked, history = codes(5), codes(256)
    bits = differing_bits(asked, history, 64)
    slow = np.unpackbits(asked[:, None] ^ history[None], axis=2).sum(2).reshape(5, 4, 64).min(2)
    assert bits.tolist() == slow.tolist()
    assert votes_by_bits(bits, 64).tolist() == activity_votes(asked, history, 64).tolist()


def test_a_block_is_counted_once_and_forgotten_with_its_history():
    null_bits, history = NullBits(codes(7), 64), History([block(), block(), block()])
    found = null_bits.of(history, 2 * BLOCK)
    assert found.shape == (7, 16)
    history.blocks[0].parts[-1].zero_()  # blocks never change; what is counted stays
    assert (null_bits.of(history, 2 * BLOCK) == found).all()
    assert len(null_bits._known) == 2
    del history
    gc.collect()
    assert not null_bits._known


def new_recaller(nulls, layers=()):
    return Recaller(["activity"], Retrieval(layers, BOOK, nulls=nulls), [None], [torch.zeros(1, 1, 4)] * 3,
                    block=64, room=512, distance=512)  # fmt: skip


def test_activity_leaves_a_hub_alone():
    """A block is like the question, another one like it too, and like any other question."""
    asked, null, own = codes(1), codes(3), codes(2 * BLOCK)
    own[700], own[900:903], own[905] = asked[0], null, asked[0]
    history = History([block(own=own[:BLOCK]), block(own=own[BLOCK:])])
    found = Asked(codes=torch.from_numpy(asked))
    plain = new_recaller(Nulls())._activity(found, history, 2 * BLOCK)
    assert set(np.argsort(-plain)[:2]) == {700 // 64, 900 // 64}
    compared = new_recaller(Nulls((1, 2), {}, null))._activity(found, history, 2 * BLOCK)
    assert np.argmax(compared) == 700 // 64
    assert compared[900 // 64] < 0.1 * compared[700 // 64]


def test_attention_leaves_a_hub_alone():
    keys = torch.zeros(1, 2 * BLOCK, 4)
    keys[0, 700, 0], keys[0, 900] = 9.0, torch.tensor([9.0, 9.0, 0.0, 0.0])
    history = History([block(keys[:, :BLOCK]), block(keys[:, BLOCK:])])
    asked = Asked((0,), {0: torch.tensor([[[1.0, 0, 0, 0]] * 2] * 2)}, {0: 1.0})
    nulls = Nulls((1, 2), {0: torch.tensor([[[0, 1.0, 0, 0]] * 3] * 2)})
    plain, compared = (
        new_recaller(one, (0,))._attention(asked, range(5000, 5002), history, 2 * BLOCK) for one in (Nulls(), nulls)
    )
    assert plain[700 // 64] == pytest.approx(plain[900 // 64])
    assert np.argmax(compared) == 700 // 64
    assert compared[900 // 64] < 0.1 * compared[700 // 64]
    elsewhere = Nulls((1,), {3: torch.zeros(2, 1, 4)})  # of another layer: of no use here
    assert new_recaller(elsewhere, (0,))._attention(asked, range(5000, 5002), history, 2 * BLOCK) == pytest.approx(
        plain
    )
