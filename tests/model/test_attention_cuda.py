"""The CUDA attention's planning and merging, with a plain stand-in for the kernel; tests/gpu has the kernel itself."""

import pytest
import torch

from pacellm.model.attention import cuda as attention_cuda
from pacellm.model.attention import prefill as prefill_kernels
from pacellm.model.context import Chunk, Run
from tests.model import stand_ins
from tests.model.cuda_steps import check


# the kernel aligns windows to the end of the keys that it sees, so the order of the layers must not matter
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("windows", [(None, 100), (100, None), (4, 700, None)])
def test_every_sequence_gets_its_own_attention(monkeypatch, windows, dtype, tolerance):
    monkeypatch.setattr(prefill_kernels, "_flash", stand_ins.flash)
    check(dtype, "cpu", windows, tolerance)


def test_short_chunks_behind_many_keys_are_cut(monkeypatch):
    """As many pieces as fill the device, over runs; not where each must be as alone."""
    monkeypatch.setattr(prefill_kernels, "_flash", stand_ins.flash)
    chunk = Chunk(0, 200, 200_000, (Run(0, 0, 131_072), Run(131_072, 140_000, 70_000)))
    pieces = attention_cuda._cut(chunk, heads=28)
    assert sum(piece.length for piece in pieces) == 200_000
    assert [piece.start for piece in pieces] == [0, *torch.tensor([p.length for p in pieces]).cumsum(0)[:-1].tolist()]
    assert 4 <= len(pieces) <= 6
    assert attention_cuda._own(chunk) == Run(200_000, 140_000 + 200_000 - 131_072, 200)
    assert attention_cuda._cut(Chunk(0, 2048, 200_000, chunk.runs), heads=28) == []
    assert attention_cuda._cut(Chunk(0, 200, 900, chunk.runs), heads=28) == []


@pytest.mark.parametrize(
    ("dtype", "key_size", "value_size", "says"),
    [
        (torch.bfloat16, 128, 128, None),
        (torch.float32, 128, 128, "not float32"),
        (torch.float16, 128, 64, "heads"),
        (torch.float16, 20, 20, "heads"),
        (torch.bfloat16, 512, 512, "heads"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(dtype, key_size, value_size, says):
    reason = attention_cuda.why_not(dtype, key_size, value_size)
    assert reason is None if says is None else says in reason


def decode_kernel(query, keys, values, rows, scale, window, splits):
    """What the Triton kernel computes (tests/triton_cases.py has the kernel itself)."""
    group, found = query.shape[0] // keys.shape[0], []
    for row, (length, table) in enumerate(zip(rows.lengths.tolist(), rows.tables.tolist(), strict=True)):
        first = 0 if window is None else max(0, length - window)
        slots = torch.tensor([table[place // 512] + place % 512 for place in range(first, length)])
        mine, theirs = (slab[:, slots].double().repeat_interleave(group, 0) for slab in (keys, values))
        weights = (query[:, row, None].double() @ mine.transpose(1, 2) * scale).softmax(-1)
        found.append((weights @ theirs)[:, 0])
    return torch.stack(found).to(query.dtype)


@pytest.mark.parametrize("windows", [(None, 100), (100, None)])
def test_decoded_tokens_go_to_their_own_kernel(monkeypatch, windows):
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].shape[1])
        return decode_kernel(*arguments)

    monkeypatch.setattr(prefill_kernels, "_flash", stand_ins.flash)
    monkeypatch.setattr(attention_cuda, "_decode_kernel", counted)
    check(torch.float32, "cpu", windows, 1e-4)
    assert calls == [2] * len(windows)


@pytest.mark.parametrize(("wrong", "says"), [(0.0, None), (0.5, "off by 0.5"), (torch.nan, "off by nan")])
def test_a_kernel_is_tried_out_before_it_is_used(monkeypatch, wrong, says):
    monkeypatch.setattr(attention_cuda, "_decode_kernel", None)
    monkeypatch.setattr(attention_cuda, "_load_decode_kernel", lambda: lambda *args: decode_kernel(*args) + wrong)
    found = attention_cuda.no_decode_kernel([((2, 16), (2, 16))], torch.float32, torch.device("cpu"))
    assert found is None if says is None else says in found
    assert (attention_cuda._decode_kernel is None) == (says is not None)


def test_where_there_is_no_triton_it_says_so(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(attention_cuda, "_load_decode_kernel", missing)
    found = attention_cuda.no_decode_kernel([((2, 16), (2, 16))], torch.float32, torch.device("cpu"))
    assert "triton" in found
