"""What is asked, whatever is asked of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """A question with what it takes to score an answer.

    Attributes:
        text: the user's message, or all of a raw prompt.
        score: an answer's, from 0 to 1.
    """

    text: str
    score: Callable[[str], float]


@dataclass(frozen=True)
class Sample:
    """One question of a suite. Its text is made when it is asked: thousands of long prompts would not fit in memory.

    Attributes:
        task: the suite's name of the task.
        length: tokens that prompt and answer may take together; None where the suite does not say.
        name: its own among those of the task and length.
        document: what intervals draw: samples of one document are not independent.
        max_tokens: of the answer.
        is_raw: a text to be gone on with, not a message.
        about: what the record tells beside (a needle's depth).
        make: the prompt; deterministic.
    """

    task: str
    length: int | None
    name: str
    document: str
    max_tokens: int
    make: Callable[[], Prompt]
    is_raw: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int | None, str]:
        """Its own in the suite."""
        return self.task, self.length, self.name


class Suite(Protocol):
    """A set of tasks."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that prompts of equal keys depend on; answers are kept together while it stays the same."""

    def samples(self) -> Iterable[Sample]:
        """In the order in which they are asked."""
