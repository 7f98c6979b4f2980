"""KV memory as refcounted blocks in runs. This decides *where*, the runner's slab holds *what*.

A block is ``BLOCK`` tokens. A table's blocks need not be adjacent, but the allocator keeps them so where it can:
it extends the last run while the next block is free, and starts a new run in the smallest hole that fits what is asked
for with ``GAP`` blocks to spare on both sides, so that runs can grow; else in the smallest that fits, else in the
largest.
"""

from __future__ import annotations

from pacellm.kv.history import History
from pacellm.model.context import Run
from pacellm.view import BLOCK, WHOLE, View

GAP = 8


class OutOfBlocks(Exception):
    """There are not enough free blocks; nothing was allocated."""


class BlockAllocator:
    """Blocks 0 to ``num_blocks - 1`` and who holds them."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._num_free

    def references(self, block: int) -> int:
        """How many tables hold a block."""
        return self._references[block]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take ``count`` blocks, adjacent to block ``after`` and to each other where possible.

        Raises:
            OutOfBlocks: fewer are free; nothing is taken.
        """
        if count > self._num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self._num_free} free")
        taken: list[int] = []
        following = -1 if after is None else after + 1
        while len(taken) < count:
            if not 0 <= following < self.num_blocks or self._references[following]:
                following = self._hole(count - len(taken))
            self._references[following] = 1
            self._num_free -= 1
            taken.append(following)
            following += 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more holder for each block."""
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One holder less for each block; a block that nobody holds is free."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._num_free += 1

    def _hole(self, wanted: int) -> int:
        """Where a run of ``wanted`` blocks begins, or the best part of it."""
        holes = self._holes()
        roomy = [hole for hole in holes if hole[0] >= wanted + 2 * GAP]
        if roomy:
            return min(roomy)[1] + GAP
        fitting = [hole for hole in holes if hole[0] >= wanted]
        return min(fitting)[1] if fitting else max(holes)[1]

    def _holes(self) -> list[tuple[int, int]]:
        """(blocks, first block) of every free stretch."""
        holes, size = [], 0
        for block in range(self.num_blocks + 1):
            if block < self.num_blocks and not self._references[block]:
                size += 1
            elif size:
                holes.append((size, block - size))
                size = 0
        return holes


class KVTable:
    """Where one sequence's KV lies: its blocks in order of place.

    Args:
        view: what they stand for.
        history: what has left the view's window, or more.
    """

    def __init__(self, blocks: list[int] | None = None, view: View = WHOLE, history: History | None = None) -> None:
        self.blocks = blocks or []
        self.view, self.history = view, history or History()
        self._runs: tuple[Run, ...] | None = None

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self.blocks) * BLOCK + self.view.offset

    def place(self, position: int) -> int:
        """Where a position lies among the table's tokens."""
        return position - self.view.offset

    @property
    def window(self) -> list[int]:
        """The blocks behind the front."""
        return self.blocks[self.view.front // BLOCK :]

    def drop_front(self, allocator: BlockAllocator) -> None:
        """Take the front away: it is made anew for whoever goes on."""
        allocator.release(self.blocks[: self.view.front // BLOCK])
        self.replace(self.window, View(self.view.start))

    def replace(self, blocks: list[int], view: View) -> None:
        """It stands for another view, in these blocks."""
        self.blocks, self.view, self._runs = blocks, view, None

    def extend(self, blocks: list[int]) -> None:
        """Add blocks at the end."""
        self.blocks.extend(blocks)
        self._runs = None

    def runs(self) -> tuple[Run, ...]:
        """The table as runs of adjacent blocks, by place, in tokens."""
        if self._runs is None:
            self._runs = _runs(self.blocks)
        return self._runs


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens``."""
    return -(-num_tokens // BLOCK)


def _runs(blocks: list[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    first = 0
    for number in range(1, len(blocks) + 1):
        if number == len(blocks) or blocks[number] != blocks[number - 1] + 1:
            runs.append(Run(first * BLOCK, blocks[first] * BLOCK, (number - first) * BLOCK))
            first = number
    return tuple(runs)
