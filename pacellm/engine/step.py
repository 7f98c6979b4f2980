"""What one forward pass does: which tokens of which sequences, and the KV to copy before. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from pacellm.engine.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """``count`` tokens of a sequence's current turn, from its cursor.

    Attributes:
        watched: layers whose queries of the one decoded token are wanted, to measure what it attends to.
        asks: layers that look at the tokens, which are a question: what it calls back is to be chosen, and nothing of
            them is kept. None: they are fed.
        ends: None for tokens that are known. Else the one token is still being chosen on the device, by the step
            before, and nothing is fed where it is one of these.
    """

    sequence: Sequence
    count: int
    ends: tuple[int, ...] | None = None
    asks: tuple[int, ...] | None = None
    watched: tuple[int, ...] = ()

    @property
    def cursor(self) -> int:
        """Tokens of the turn that are fed before."""
        return self.sequence.cursor + (self.ends is not None)

    @property
    def position(self) -> int:
        """Absolute position of the first token."""
        return self.sequence.turn.start + self.cursor

    @property
    def place(self) -> int:
        """Where it lies in its sequence's table."""
        return self.sequence.table.place(self.position)


@dataclass(frozen=True)
class Copy:
    """``length`` tokens of KV to copy between slots before the step."""

    source: int
    target: int
    length: int


@dataclass
class Step:
    """What one forward pass does."""

    work: list[Work] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Rows of the packed step."""
        return sum(item.count for item in self.work)
