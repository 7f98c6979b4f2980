"""Below the device: a session's KV and banks in host memory, and the copies between the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pacellm.kv.blocks import KVTable
from pacellm.kv.history import History
from pacellm.memory.state import Banks, banks_nbytes, copy_banks


class Span(NamedTuple):
    """``length`` tokens from position ``start``, in the slab from ``slot``."""

    start: int
    slot: int
    length: int


def spans_of(table: KVTable) -> list[Span]:
    """Where a table's tokens lie."""
    return [Span(run.start, run.slot, run.length) for run in table.runs()]


@dataclass
class HostState:
    """A session's KV and banks outside the device.

    Attributes:
        kv: [heads, tokens, size] for every slab (keys of all layers, then values); empty where only banks are kept.
        banks: by layer; empty without PA.
        tokens: that the KV stands for.
        history: what lies before them.
    """

    kv: list[Tensor]
    banks: Banks
    tokens: int
    history: History = field(default_factory=History)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.kv) + banks_nbytes(self.banks)

    def clear(self) -> None:
        """Let the memory go now, whoever still holds this object."""
        self.kv, self.banks, self.history = [], {}, History()


def download(slabs: list[Tensor], spans: list[Span], tokens: int, banks: Banks) -> HostState:
    """KV in the slabs and banks, copied to host memory (pinned where they lie on a GPU, and beside its other work)."""
    pin = bool(slabs) and slabs[0].is_cuda
    kv = []
    with torch.inference_mode(), _beside(slabs):
        for slab in slabs:
            host = torch.empty(slab.shape[0], tokens, slab.shape[2], dtype=slab.dtype, pin_memory=pin)
            for span in cut(spans, tokens):
                _copy(host[:, span.start : span.start + span.length], slab[:, span.slot : span.slot + span.length])
            kv.append(host)
        return HostState(kv, copy_banks(banks, pin=pin), tokens)


def upload(state: HostState, slabs: list[Tensor], spans: list[Span], banks: Banks) -> None:
    """The way back: KV into the slabs' spans and banks into ``banks``, every tensor overwritten."""
    with torch.inference_mode(), _beside(slabs):
        for host, slab in zip(state.kv, slabs, strict=True):
            for span in cut(spans, state.tokens):
                _copy(slab[:, span.slot : span.slot + span.length], host[:, span.start : span.start + span.length])
        for layer, bank in banks.items():
            bank.copy_(state.banks[layer])


@contextmanager
def _beside(slabs: list[Tensor]) -> Iterator[None]:
    """On a GPU a stream of its own, behind what the device was given so far, and waited for at the end."""
    if not slabs or not slabs[0].is_cuda:
        yield
        return
    side = torch.cuda.Stream(slabs[0].device)
    side.wait_stream(torch.cuda.default_stream(slabs[0].device))
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        side.synchronize()


def _copy(target: Tensor, source: Tensor) -> None:
    """[heads, n, size]; between a GPU and pinned memory head by head, because each is one piece on both sides."""
    if target.is_cuda or source.is_cuda:
        for one, other in zip(target, source, strict=True):
            one.copy_(other, non_blocking=True)
    else:
        target.copy_(source)


def cut(spans: list[Span], tokens: int) -> list[Span]:
    """The parts of ``spans`` before position ``tokens``."""
    return [Span(span.start, span.slot, min(span.length, tokens - span.start)) for span in spans if span.start < tokens]
