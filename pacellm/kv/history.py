"""What has left a table's window: keys and values by block, in host memory, for good.

A block is written once and never changes, so forks, cached prefixes and running requests share it, and it is gone when
nobody holds it any more.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pacellm.view import BLOCK, Span


class HistoryMemory:
    """Counts the bytes of all blocks."""

    def __init__(self) -> None:
        self._bytes = 0
        self._lock = threading.Lock()  # a block may be let go in any thread

    @property
    def bytes(self) -> int:
        """Bytes of blocks that somebody holds."""
        return self._bytes

    def new_block(self, like: Sequence[Tensor], *, pin: bool = False) -> HistoryBlock:
        """An empty block of parts shaped as ``like``, counted until nobody holds it."""
        block = HistoryBlock(like, pin=pin)
        self._count(block.nbytes)
        weakref.finalize(block, self._count, -block.nbytes)
        return block

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._bytes += nbytes


class HistoryBlock:
    """``BLOCK`` tokens.

    Args:
        like: [heads, .., size] tensors, one for each part; dtype, heads and size are taken.

    Attributes:
        parts: [heads, BLOCK, size] keys of every layer that sees all, then the values, then codes where they are made.
    """

    __slots__ = ("__weakref__", "nbytes", "parts")

    def __init__(self, like: Sequence[Tensor], *, pin: bool = False) -> None:
        shapes = [(part.shape[0], BLOCK, part.shape[2]) for part in like]
        sizes = [part.element_size() * math.prod(shape) for part, shape in zip(like, shapes, strict=True)]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pin)
        self.nbytes = memory.nbytes
        self.parts = [
            piece.view(part.dtype).view(shape)
            for piece, part, shape in zip(memory.split(sizes), like, shapes, strict=True)
        ]


class History:
    """A sequence's blocks from its beginning on."""

    def __init__(self, blocks: Sequence[HistoryBlock] = ()) -> None:
        self.blocks = list(blocks)

    @property
    def tokens(self) -> int:
        """Tokens from the beginning that are there."""
        return len(self.blocks) * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks, which are all alike."""
        return len(self.blocks) * self.blocks[0].nbytes if self.blocks else 0

    def until(self, position: int) -> History:
        """The same blocks, as far as they lie wholly before ``position``."""
        return History(self.blocks[: position // BLOCK])

    def pieces(self, span: Span) -> Iterator[tuple[HistoryBlock, int, int]]:
        """(block, its first token, its last + 1) of each part of a span."""
        position = span.start
        while position < span.end:
            first = position % BLOCK
            last = min(BLOCK, first + span.end - position)
            yield self.blocks[position // BLOCK], first, last
            position += last - first
