"""Below the device: a session's KV and banks in host memory, and the worker that moves them.

Nothing here knows the engine. Every move is a job of one worker thread, so that no step waits for it; a job works
only on memory that nobody else touches meanwhile (blocks and rows that the engine holds back until the job ends).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pacellm.memory.state import BankState

logger = logging.getLogger("pacellm.memory")
Banks = dict[int, BankState]


class Span(NamedTuple):
    """``length`` tokens from position ``start``, in the slab from ``slot``."""

    start: int
    slot: int
    length: int


@dataclass
class HostState:
    """A session's KV and banks outside the device.

    Attributes:
        kv: [heads, tokens, size] for every slab (keys of all layers, then values); empty where only banks are kept.
        banks: by layer; empty without PA.
        tokens: that the KV stands for.
    """

    kv: list[Tensor]
    banks: Banks
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.kv) + banks_nbytes(self.banks)

    def clear(self) -> None:
        """Let the memory go now, whoever still holds this object."""
        self.kv, self.banks = [], {}


def banks_nbytes(banks: Banks) -> int:
    """Bytes of banks."""
    return sum(tensor.nbytes for bank in banks.values() for tensor in bank)


def copy_banks(banks: Banks, *, pin: bool = False) -> Banks:
    """Copies in host memory."""
    return {layer: type(bank)(*(_to_host(tensor, pin) for tensor in bank)) for layer, bank in banks.items()}


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


def _to_host(tensor: Tensor, pin: bool) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
    return host.copy_(tensor, non_blocking=pin)


def _last() -> None:
    """The job that ends a worker's thread."""


class Worker:
    """One thread that runs jobs in order. Results are taken by the owner, in its own thread, by :meth:`poll`.

    Args:
        on_error: told what was raised by whoever took a result, or was to be woken; such a failure ends nothing else.

    Attributes:
        on_done: called in the worker's thread after each job, so that the owner may be woken.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self.on_done: Callable[[], None] | None = None
        self._on_error = on_error
        self._jobs: deque[tuple[Callable[[], Any], Future[Any], Callable[[Future[Any]], None]]] = deque()
        self._done: deque[tuple[Future[Any], Callable[[Future[Any]], None]]] = deque()
        self._changed = threading.Condition()
        self._open = 0
        self._thread: threading.Thread | None = None

    @property
    def num_open(self) -> int:
        """Jobs whose result was not taken yet."""
        return self._open

    @property
    def has_results(self) -> bool:
        """A job has ended and :meth:`poll` would say so."""
        return bool(self._done)

    def submit(self, job: Callable[[], Any], then: Callable[[Future[Any]], None]) -> Future[Any]:
        """Run ``job`` in the worker's thread, and later ``then`` with its future inside :meth:`poll`."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # whoever waits for it may leave, but not take the job away
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="pacellm-mover", daemon=True)
                self._thread.start()
            self._open += 1
            self._jobs.append((job, future, then))
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """End the thread after the jobs that wait; a later job starts another."""
        with self._changed:
            if self._thread is not None:
                self._jobs.append((_last, Future(), lambda done: None))
                self._changed.notify_all()
                self._thread = None

    def poll(self) -> bool:
        """Take the results of jobs that have ended. False where there were none."""
        found = False
        while self._done:
            future, then = self._done.popleft()
            self._open -= 1
            found = True
            try:
                then(future)
            except Exception as error:
                self._on_error(error)
        return found

    def wait(self, timeout: float) -> None:
        """Until a job has ended, or ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._done) or not self._open, timeout)

    def finish(self) -> None:
        """Wait for every job and take its result, those that results start included."""
        while self._open:
            self.wait(1.0)
            self.poll()

    def _main(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                job, future, then = self._jobs.popleft()
            if job is _last:
                return
            try:
                future.set_result(job())
            except BaseException as error:  # handed to whoever takes the result
                future.set_exception(error)
            with self._changed:
                self._done.append((future, then))
                self._changed.notify_all()
            del job, future, then  # a waiting thread keeps nobody's memory
            if self.on_done is not None:
                try:
                    self.on_done()
                except Exception as error:
                    self._on_error(error)
