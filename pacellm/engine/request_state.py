"""A request and its text, while it is in the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from pacellm.engine.sequence import Sequence
from pacellm.text.stream import TextStream
from pacellm.types import Finished


@dataclass
class Live:
    """A request in the engine, or one of its choices.

    Attributes:
        sequence, text: its tokens, and their text as it grows; None without a tokenizer.
        last: its last event, once it is complete.
        index: of the choice. ``choices``: all of its request, by index, where there are several.
        is_recorded: its commit is on its way to disk and can no longer be taken back.
    """

    sequence: Sequence
    text: TextStream | None
    last: Finished | None = None
    index: int = 0
    choices: list[Live] = field(default_factory=list)
    is_recorded: bool = False

    @property
    def name(self) -> str:
        """The id of the request that it belongs to."""
        return self.sequence.id.rpartition("#")[0] if self.index else self.sequence.id
