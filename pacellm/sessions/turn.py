"""The turns that a session's log is made of. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pacellm.model.context import Piece
from pacellm.modes import PAMode
from pacellm.view import Budget, Recall, View, next_view, view_of


@dataclass
class Turn:
    """Tokens fed in one go, with all that is needed to feed them again to the same bit.

    Attributes:
        start: absolute position of the first token (c); what stood there before is overwritten.
        prompt_end: position at which the prompt ended; tokens from there on were decoded, each its own segment.
        ids: the tokens from ``start`` on.
        pa: how banks took part.
        density: part of the experts that decoded tokens used, in whole millionths.
        budget: of what its tokens see; None is no limit.
        recall: what those from its ``start`` on see beyond the budget, once that was chosen.
    """

    start: int
    prompt_end: int
    ids: array[int]
    pa: PAMode
    density: float = 1.0
    budget: Budget | None = None
    recall: Recall | None = None

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.ids)

    def view(self, position: int) -> View:
        """What a token at ``position`` sees."""
        return view_of(self.budget, self.recall, position)

    def next_view(self, position: int) -> int | None:
        """The first position after ``position`` that may see another view; None where there is none."""
        return next_view(self.budget, self.recall, position)

    def pieces(self, cursor: int, count: int, row: int, segment: int) -> Iterator[Piece]:
        """``count`` tokens from ``cursor``, cut at segment ends: multiples of ``segment``, the prompt's end, then
        every token. Rows count from ``row``."""
        position, stop = self.start + cursor, self.start + cursor + count
        while position < stop:
            if position < self.prompt_end:
                boundary = min(position - position % segment + segment, self.prompt_end)
            else:
                boundary = position + 1
            end = min(boundary, stop)
            yield Piece(row, row + end - position, end == boundary)
            row, position = row + end - position, end


def common_prefix(first: array[int], second: array[int]) -> int:
    """Length of the common prefix of two id arrays."""
    length = min(len(first), len(second))
    if not length:
        return 0
    a, b = np.frombuffer(first, dtype=np.int32)[:length], np.frombuffer(second, dtype=np.int32)[:length]
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else length
