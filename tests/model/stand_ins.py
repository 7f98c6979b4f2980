"""What CUDA's attention kernels compute, plainly and on a CPU, with the limits that the real ones have."""

import sys
import types

import torch

from pacellm.model.attention import prefill as prefill_kernels


def one(query, key, value, causal, scale, left=-1):
    """[n, H, D] queries at the end of [N, Hkv, D] keys -> ([n, H, D], lse [H, n])."""
    group, count, used = query.shape[1] // key.shape[1], query.shape[0], key.shape[0]
    keys, values = (slab.transpose(0, 1).double().repeat_interleave(group, 0) for slab in (key, value))
    scores = query.transpose(0, 1).double() @ keys.transpose(1, 2) * scale
    distance = torch.arange(used - count, used)[:, None] - torch.arange(used)
    if causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if left >= 0:
        scores = scores.masked_fill(distance > left, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1).to(query.dtype), scores.logsumexp(-1).float()


def flash(
    query, key, value, cu_queries, starts, max_queries, max_keys, dropout, causal, debug,
    *, scale, window_size_left=-1, window_size_right=-1, seqused_k=None,
):  # fmt: skip
    """``aten::_flash_attention_forward``: ([n, H, D], lse [H, n]) of packed sequences, with a batch dimension of dense
    ones."""
    assert not dropout
    assert not debug
    if cu_queries is None:
        assert (query.shape[:2], key.shape[:2]) == ((1, max_queries), (1, max_keys))
        output, lse = one(query[0], key[0], value[0], causal, scale)
        return output[None], lse[None]
    assert window_size_right == (0 if causal else -1)
    return packed(
        query, key, value, cu_queries, starts, max_queries, max_keys, seqused_k, causal, scale, window_size_left
    )


def packed(query, key, value, cu_queries, starts, max_queries, max_keys, used, causal, scale, left):
    """Sequences whose keys lie apart: ([n, H, D], lse [H, n])."""
    assert cu_queries.dtype == starts.dtype == used.dtype == torch.int32
    outputs, totals = [], []
    for number, (start, length) in enumerate(zip(starts[:-1].tolist(), used.tolist(), strict=True)):
        rows, slots = slice(int(cu_queries[number]), int(cu_queries[number + 1])), slice(start, start + length)
        assert rows.stop - rows.start <= max_queries
        assert length <= max_keys
        output, lse = one(query[rows], key[slots], value[slots], causal, scale, left)
        outputs.append(output)
        totals.append(lse)
    return torch.cat(outputs), torch.cat(totals, dim=1)


def cudnn(query, key, value, bias, with_lse, dropout, causal, debug, *, scale):
    """``aten::_scaled_dot_product_cudnn_attention`` on [1, H, n, D], causal from the upper left, lse [1, H, n, 1]."""
    assert bias is None
    assert with_lse
    assert not dropout
    assert not debug
    queries, keys = query.shape[2], key.shape[2]
    assert not causal or queries == keys, "causal from the upper left is right for squares alone"
    for count in (queries, keys):
        units, rest = divmod(count, prefill_kernels.CUDNN_STEP)
        assert not rest, "every shape is compiled"
        assert units.bit_count() == 1, "every shape is compiled"
    output, lse = one(*(part[0].transpose(0, 1) for part in (query, key, value)), causal, scale)
    return output.transpose(0, 1)[None], lse[None, ..., None]


def flash_attn_2(monkeypatch):
    """Put a module ``flash_attn`` in place."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                        return_attn_probs=False):  # fmt: skip
        assert return_attn_probs
        output, lse = one(q[0], k[0], v[0], causal, softmax_scale, window_size[0])
        return output[None], lse[None], None

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def flash_attn_3(monkeypatch):
    """Put a module ``flash_attn_interface`` in place, in its first form, which always gives the log-sum-exp."""

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=None,
                               softmax_scale=None, causal=False, window_size=(-1, -1)):  # fmt: skip
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, causal,
                      softmax_scale, window_size[0])  # fmt: skip

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return module


def everything(monkeypatch):
    """All kernels, as if they were installed."""
    monkeypatch.setattr(prefill_kernels, "_flash", flash)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    flash_attn_2(monkeypatch)
    flash_attn_3(monkeypatch)
