"""What has left a table's window: keys and values by block, below the device, for good.

A block is written once and never changes, so forks, cached prefixes and running requests share it, and it is gone when
nobody holds it any more. It lies in host memory, or in a file whose map its parts are then.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pacellm.view import BLOCK, Span


class BlockFile(NamedTuple):
    """Where a block's bytes are, or were: a file may be gone while its map lives. ``tag`` is its digest."""

    path: Path
    tag: str


class HistoryBlock:
    """``BLOCK`` tokens.

    Args:
        parts: [heads, BLOCK, size] keys of every layer that sees all, then the values, then codes where they are made.
        name: 32 hex digits, as of the file that it was read from; None makes one.
        file: that its parts are a map of; None where they lie in host memory.
    """

    __slots__ = ("__weakref__", "_leave", "file", "name", "nbytes", "parts")

    def __init__(self, parts: list[Tensor], name: str | None = None, file: BlockFile | None = None) -> None:
        self.parts, self.file = parts, file
        self.name, self.nbytes = name or os.urandom(16).hex(), sum(part.nbytes for part in parts)
        self._leave: Callable[[], object] | None = None

    def counted(self, leave: Callable[[], object]) -> None:
        """It takes host memory; ``leave`` is called when it does no more."""
        self._leave = leave

    def moved(self, parts: list[Tensor], file: BlockFile) -> None:
        """The same bytes are in a file. Whoever reads the former parts at this moment holds them until it has."""
        self.parts, self.file = parts, file
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


def empty_parts(like: Sequence[Tensor], *, pin: bool = False) -> list[Tensor]:
    """Parts of a block in one piece of host memory, yet to be filled.

    Args:
        like: [heads, .., size] tensors, one for each part; dtype, heads and size are taken.
    """
    shapes = [(part.shape[0], BLOCK, part.shape[2]) for part in like]
    sizes = [part.element_size() * math.prod(shape) for part, shape in zip(like, shapes, strict=True)]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pin)
    return [
        piece.view(part.dtype).view(shape) for piece, part, shape in zip(memory.split(sizes), like, shapes, strict=True)
    ]


class HistoryMemory:
    """Counts blocks in host memory, and names those that are to leave it."""

    def __init__(self) -> None:
        self._bytes = 0
        self._staying: dict[int, weakref.ref[HistoryBlock]] = {}  # by id, oldest first
        self._leaving: dict[int, int] = {}  # bytes by id
        self._lock = threading.RLock()  # a block may be let go in any thread, also by who holds it

    @property
    def bytes(self) -> int:
        """Bytes of blocks in host memory that somebody holds."""
        return self._bytes

    @property
    def leaving(self) -> int:
        """Bytes of those that :meth:`oldest` has named and that are still there."""
        with self._lock:
            return sum(self._leaving.values())

    def new_block(self, like: Sequence[Tensor], *, pin: bool = False) -> HistoryBlock:
        """A block of parts shaped as ``like`` and yet to be filled, counted until it has a file or nobody holds it."""
        block = HistoryBlock(empty_parts(like, pin=pin))
        number, nbytes = id(block), block.nbytes
        with self._lock:
            self._bytes += nbytes
        block.counted(weakref.finalize(block, self._left, number, nbytes))
        return block

    def stays(self, block: HistoryBlock) -> None:
        """A block is complete and may leave, or could not."""
        with self._lock:
            self._staying[id(block)] = weakref.ref(block)
            self._leaving.pop(id(block), None)

    def oldest(self, nbytes: int) -> list[HistoryBlock]:
        """Blocks of ``nbytes`` together, or all that stay. They are to leave now, or :meth:`stays` is called."""
        found: list[HistoryBlock] = []
        with self._lock:
            for number, reference in list(self._staying.items()):
                if nbytes <= 0:
                    break
                block = reference()
                self._staying.pop(number, None)
                if block is not None:
                    found.append(block)
                    self._leaving[number] = block.nbytes
                    nbytes -= block.nbytes
        return found

    def _left(self, number: int, nbytes: int) -> None:
        with self._lock:
            self._bytes -= nbytes
            self._staying.pop(number, None)
            self._leaving.pop(number, None)


class History:
    """A sequence's blocks from its beginning on."""

    def __init__(self, blocks: Sequence[HistoryBlock] = ()) -> None:
        self.blocks = list(blocks)

    @property
    def tokens(self) -> int:
        """Tokens from the beginning that are there."""
        return len(self.blocks) * BLOCK

    @property
    def host_bytes(self) -> int:
        """Bytes of its blocks in host memory."""
        return sum(block.nbytes for block in self.blocks if block.file is None)

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
