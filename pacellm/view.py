"""What a token sees of a history that outgrew its budget. No torch.

A view is what a table's KV stands for: a *front*, which is a copy of parts of the history that was called back, shown
directly before the *window*, which runs from ``start`` to the sequence's end. Everything between the front and the
window is out of sight. A token at position p lies at *place* ``p - start + front``. A sequence within its budget has
no front and a window from 0, so that places are positions.

What a token sees follows from its position and from what its turn has recorded (``Recall``), never from how a prompt
was cut, what ran beside it, or where its history lay:

* Positions below the budget see all before them.
* Later ones are *read*: they see the history's first block and a window, which moves by whole blocks.
* Those of a turn from ``Recall.start`` on see what was called back for it in place of the first block, and the same
  window: a small model finds what is near better than what is far.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

BLOCK = 512
"""Tokens of one block, of KV memory and of the history."""


class Span(NamedTuple):
    """``length`` tokens of a history from position ``start``."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.length


@dataclass(frozen=True)
class View:
    """A front of ``spans``, in order, and a window from ``start``, which begins a block."""

    start: int = 0
    spans: tuple[Span, ...] = ()

    @property
    def front(self) -> int:
        """Tokens of the front; whole blocks."""
        return sum(span.length for span in self.spans)

    @property
    def offset(self) -> int:
        """What a position is more than its place."""
        return self.start - self.front

    @property
    def is_whole(self) -> bool:
        """Nothing is out of sight."""
        return self.start == 0


WHOLE = View()
_SINKS = (Span(0, BLOCK),)


class Budget(NamedTuple):
    """How much of a history a token may see.

    Attributes:
        tokens: of a view, all that it holds on the device; whole blocks.
        window: tokens that one that is read sees before its own block; whole blocks.
    """

    tokens: int
    window: int

    @property
    def room(self) -> int:
        """Tokens that may be called back, beside the first block and the smallest window."""
        return self.tokens - self.window - 2 * BLOCK

    def reading(self, position: int) -> View:
        """What a token at ``position`` sees while a prompt is read."""
        if position < self.tokens:
            return WHOLE
        return View(_block(position) - self.window, _SINKS)


@dataclass(frozen=True)
class Recall:
    """What a turn sees of a history beyond its budget, as it was chosen once and for all.

    Attributes:
        start: the first position that sees it; at least the budget.
        spans: called back, ascending, the history's first block among them; whole blocks together.
        budget: as it was when they were chosen.
    """

    start: int
    spans: tuple[Span, ...]
    budget: Budget

    def view(self, position: int) -> View:
        """What a token at ``position``, from ``start`` on, sees."""
        window = self.budget.window + BLOCK if self.spans != _SINKS else self.budget.tokens - BLOCK
        return View(max(BLOCK, _block(position) + BLOCK - window), self.spans)

    @classmethod
    def recent(cls, budget: Budget) -> Recall:
        """Nothing is called back: an answer that outgrows the budget loses what is oldest, the first block apart."""
        return cls(budget.tokens, _SINKS, budget)


def checked_budget(tokens: int, window: int) -> Budget:
    """A budget that was written down.

    Raises:
        ValueError: it cannot be one.
    """
    if window < BLOCK or window % BLOCK or tokens % BLOCK or not window + 3 * BLOCK <= tokens < 2**31:
        raise ValueError
    return Budget(tokens, window)


def checked_recall(budget: Budget | None, start: int, spans: list[Span]) -> Recall:
    """A recall that was written down.

    Raises:
        ValueError: it cannot be one.
    """
    if budget is None or start < budget.tokens or not _is_front(spans):
        raise ValueError
    recall = Recall(start, tuple(spans), budget)
    front = sum(span.length for span in spans)
    if front % BLOCK or front - BLOCK > budget.room or spans[-1].end > recall.view(start).start:
        raise ValueError
    return recall


def _is_front(spans: list[Span]) -> bool:
    """They ascend, none is empty, and the history's first block is among them."""
    if not spans or spans[0].start != 0 or spans[0].length < BLOCK:
        return False
    return all(span.length > 0 for span in spans) and all(one.end <= next_.start for one, next_ in pairwise(spans))


def view_of(budget: Budget | None, recall: Recall | None, position: int) -> View:
    """What a token at ``position`` sees; everything where there is no budget."""
    if recall is not None and position >= recall.start:
        return recall.view(position)
    return WHOLE if budget is None else budget.reading(position)


def next_view(budget: Budget | None, recall: Recall | None, position: int) -> int | None:
    """The first position after ``position`` that may see another view; None where there is none."""
    if budget is None:
        return None
    if position < budget.tokens and (recall is None or position < recall.start):
        return budget.tokens
    bound = _block(position) + BLOCK
    return bound if recall is None or position >= recall.start else min(bound, recall.start)


def _block(position: int) -> int:
    return position - position % BLOCK
