"""Stored keys can be shown elsewhere, for every family that is not refused by name."""

import pytest
import torch

from pacellm.errors import ConfigError, ModelError
from pacellm.model.load import prepare, probe_layers
from pacellm.model.rotation import learn_rotations, make_precise
from tests.model import family_models

# tables of positions, a rotation of their own, complex angles, chunks
REFUSED = {"biogpt", "codegen", "deepseek_v2", "gpt2", "gpt_bigcode", "gptj", "llama4_text", "nanochat", "opt"}
MOVES = (300, 400, 90)


@pytest.fixture(params=family_models.HERE)
def model(request):
    return prepare(family_models.tiny(request.param)), request.param


def test_keys_are_moved_as_the_model_turns_them(model):
    loaded, name = model
    ids, moves = torch.tensor([5, 6, 7]), torch.tensor(MOVES)
    if name in REFUSED:
        with pytest.raises((ConfigError, ModelError)):
            learned(loaded, ids, moves)
        return
    rotations, found = learned(loaded, ids, moves)
    base, _ = probe_layers(loaded.module, ids, torch.zeros_like(ids))
    for rotation, before, after in zip(rotations, base, found, strict=True):
        moved = before.key if rotation is None else rotation.moved(before.key, moves)
        torch.testing.assert_close(moved, after.key, rtol=0, atol=2e-4 * float(after.key.abs().max()))


def learned(loaded, ids, moves):
    rotations = learn_rotations(loaded)
    make_precise(loaded.module, 64)
    return rotations, probe_layers(loaded.module, ids, moves)[0]


def test_positions_before_the_start_keep_their_bits():
    module = family_models.tiny("llama")
    plain = module.model.rotary_emb
    hidden, positions = torch.zeros(1, 3, 32), torch.tensor([[3, 63, 64]])
    before = plain(hidden, positions)
    make_precise(module, 64)
    after = plain(hidden, positions)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :2], new[:, :2])


def test_a_million_is_as_precise_as_one():
    """Angles in float32 are off by hundredths of a radian there."""
    loaded = prepare(family_models.tiny("llama"))
    ids = torch.tensor([5])
    make_precise(loaded.module, 64)
    rotation = learn_rotations(loaded)[0]
    base, far = (probe_layers(loaded.module, ids, torch.tensor([place]))[0][0].key for place in (0, 1_000_003))
    torch.testing.assert_close(rotation.moved(base, 1_000_003), far, rtol=0, atol=1e-5)


def test_chunks_and_tables_are_refused_by_name():
    for name, text in (("llama4_text", "chunked attention"), ("gpt2", "positions beyond the trained")):
        with pytest.raises(ConfigError, match=text) as caught:
            learn_rotations(prepare(family_models.tiny(name)))
        assert caught.value.param == "working_memory"
