"""What indexes of working memory need of a model: layers that retrieve, and activity codes, which are what a token did
in one FFN, as a few bits.

A code is sign(((x - mean) / deviation) R) of the FFN's inner activation x, with a Gaussian R that follows from a seed.
Two tokens' activations are alike where their codes are: the share of bits that differ is their angle over pi (Charikar,
2002). Codes lie beside keys and values, a row for each slot of KV memory, and go where these go.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pacellm.model.attention.dispatch import write_rows
from pacellm.model.context import current_step
from pacellm.model.neurons import ffns
from pacellm.rows import pad_rows

_HANDLE = "_pacellm_codes"


@dataclass(frozen=True)
class CodeBook:
    """How codes are made.

    Attributes:
        layer: whose FFN is looked at.
        mean, deviation: [F] float32 of its inner activations.
        bits: of a code; a multiple of 64.
        seed: of R.
    """

    layer: int
    mean: Tensor
    deviation: Tensor
    bits: int = 256
    seed: int = 0

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return self.bits // 8

    @property
    def digest(self) -> str:
        """64 hex digits: codes of books with another one are not comparable."""
        told = hashlib.sha256(f"{self.layer} {self.bits} {self.seed}".encode())
        for numbers in (self.mean, self.deviation):
            told.update(numbers.detach().float().cpu().contiguous().numpy().tobytes())
        return told.hexdigest()

    def projection(self) -> Tensor:
        """[F, bits] float32: R, each row over its neuron's deviation."""
        generator = torch.Generator().manual_seed(self.seed)
        matrix = torch.randn(len(self.mean), self.bits, generator=generator)
        return matrix / self.deviation.cpu()[:, None]


@dataclass(frozen=True)
class Nulls:
    """Questions about nothing in particular, as the model's tokens ask them. What they vote for draws any question.

    Attributes:
        lengths: tokens of each.
        queries: by layer that retrieves [H, n, D] float32, turned to position 0.
        codes: [n, bytes] uint8, as of the book; None without one.
    """

    lengths: tuple[int, ...] = ()
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    codes: np.ndarray | None = None

    @property
    def rows(self) -> list[slice]:
        """Of each question its tokens among all."""
        ends = np.cumsum((0, *self.lengths)).tolist()
        return [slice(start, end) for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Retrieval:
    """What is known of a model that indexes need.

    Attributes:
        layers: those whose attention finds what a question is about.
        book: of activity codes.
        best: of the two indexes the one that finds more; None where nobody has compared.
        nulls: what votes are compared with; none in a calibration of before they were.
    """

    layers: tuple[int, ...] = ()
    book: CodeBook | None = None
    best: Literal["attention", "activity"] | None = None
    nulls: Nulls = Nulls()


class Coder(nn.Module):
    """Makes codes on a device.

    Args:
        book: how.
        order: [F] of each neuron its number in the book, where a layout has moved them.
    """

    def __init__(self, book: CodeBook, device: torch.device, order: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.size, self.digest = book.layer, book.size, book.digest
        matrix = book.projection()
        shift = (book.mean.cpu()[None] @ matrix)[0]
        self._matrix = (matrix if order is None else matrix[order.cpu()]).to(device)
        self._shift = shift.to(device)
        self._powers = (2 ** torch.arange(8, device=device)).to(torch.uint8)

    def forward(self, inner: Tensor) -> Tensor:
        """[T, F] inner activations -> [T, bits / 8] uint8; a row's bits do not depend on the others."""
        product = pad_rows(inner.float()) @ self._matrix
        signs = (product[: len(inner)] > self._shift).view(len(inner), self.size, 8)
        return (signs.to(torch.uint8) * self._powers).sum(-1, dtype=torch.uint8)


def attach(module: nn.Module, coder: Coder) -> None:
    """Have every step of a model write its tokens' codes."""
    ffn = ffns(module)[coder.layer]
    assert ffn is not None

    def look(down: nn.Module, given: tuple[Any, ...]) -> None:
        step = current_step()
        if step is None or step.codes is None:
            return
        codes = coder(given[0].flatten(0, -2))
        write_rows(step, [(step.codes, codes[None])])
        for chunk in step.chunks:
            if chunk.asked is not None:
                chunk.asked.codes = codes[chunk.start : chunk.stop].clone()

    setattr(module, _HANDLE, ffn.down.register_forward_pre_hook(look))


def detach(module: nn.Module) -> None:
    """Make no codes any more."""
    handle: Any = getattr(module, _HANDLE, None)
    if handle is not None:
        handle.remove()
        delattr(module, _HANDLE)
