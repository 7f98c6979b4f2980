"""What one forward pass does: which tokens of which sequences, and the KV to copy before. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from pacellm.engine.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """``count`` tokens of a sequence's current turn, from its cursor."""

    sequence: Sequence
    count: int


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
