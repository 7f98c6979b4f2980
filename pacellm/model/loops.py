"""Activation functions on a CPU whose every number has the same bits however many there are.

torch's loops take numbers by vectors and what is left over one by one, by other code with other last bits (silu,
sigmoid, the tanh form of gelu; docs/lab.md). With several threads every share has such a remainder, and with three
or more shares are of any size. Steps are padded so that all their numbers together have none; here no share has one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LANES = 64  # numbers; the longest vectors hold 16, two at a time
_SHARE = 32768  # numbers of a thread's share from which all threads have equal ones (at::internal::GRAIN_SIZE)
_ALONE = 16384  # so many one thread takes alone, also for gelu, which has a limit of its own
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def make_even(module: nn.Module) -> None:
    """Let every activation that is a module of its own be :func:`evenly` applied; once is enough."""
    for part in module.modules():
        if type(part).__module__ in _ACTIVATIONS and "forward" not in part.__dict__:
            part.forward = _Even(part.forward)


def evenly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of x; bits do not depend on x's size where that is a multiple of ``LANES``."""
    count, threads = x.numel(), torch.get_num_threads()
    if threads < 3 or count <= _ALONE:
        return function(x)
    whole = count - count % (threads * LANES) if count >= threads * _SHARE else 0
    if whole == count:
        return function(x)
    sizes = [whole, *(min(_ALONE, count - start) for start in range(whole, count, _ALONE))]
    return torch.cat([function(part) for part in x.flatten().split(sizes) if len(part)]).view(x.shape)


class _Even:
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return evenly(self._forward, x)
