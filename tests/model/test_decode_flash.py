"""Decode attention through flash-attn's paged cache, with a plain stand-in for the package."""

import sys
import types

import pytest
import torch

from pacellm.memory.feed import Tokens
from pacellm.model import attention_cuda, decode_flash
from pacellm.model.context import DecodeRows
from tests.model.stand_ins import one

BLOCK = DecodeRows.BLOCK


@pytest.fixture
def installed(monkeypatch):
    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal, window_size,
                                num_splits):  # fmt: skip
        assert causal
        assert k_cache.shape[1] % 256 == 0
        assert k_cache.stride(-1) == 1
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        assert int(block_table.max()) < len(k_cache)
        outputs = []
        for row, length in enumerate(cache_seqlens.tolist()):
            pages = block_table[row].long()
            keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
            outputs.append(one(q[row], keys, values, True, softmax_scale, window_size[0])[0])
        return torch.stack(outputs)

    module = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention_cuda, "_decode_kernel", None)


def random(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.mark.parametrize("window", [None, 200])
def test_scattered_blocks_and_padding(installed, window):
    query, keys, values = random(4, 3, 16), random(2, 4 * BLOCK + 16, 16), random(2, 4 * BLOCK + 16, 16)
    dump = 4 * BLOCK + 15  # what pads a step reads a slot that nobody owns
    tables = torch.tensor([[3 * BLOCK, 0, 2 * BLOCK], [BLOCK, 0, 0], [dump, 0, 0]], dtype=torch.int32)
    lengths = torch.tensor([1100, 70, 1], dtype=torch.int32)
    index = torch.arange(3)
    rows = DecodeRows(index, lengths, tables, Tokens(index, index > 2, index > 2, index))
    found = decode_flash.attend(query, keys, values, rows, 0.25, window, None)
    for row, length in enumerate((1100, 70)):
        slots = (tables[row].long()[:, None] + torch.arange(BLOCK)).flatten()[:length]
        left = -1 if window is None else window - 1
        own = (slab[:, slots].transpose(0, 1) for slab in (keys, values))
        expected = one(query[:, row][None], *own, True, 0.25, left)[0][0]
        torch.testing.assert_close(found[row], expected)


def test_it_is_used_where_triton_is_missing(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "pacellm.model.decode_triton", None)
    shapes = [((2, 16), (2, 16))]
    assert attention_cuda.no_decode_kernel(shapes, torch.float32, torch.device("cpu")) is None
    assert attention_cuda.decode_kernel_name() == "flash_attn_with_kvcache"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    problem = attention_cuda.no_decode_kernel(shapes, torch.float32, torch.device("cpu"))
    assert problem.startswith("Triton: ")
    assert "; flash_attn_with_kvcache: " in problem
