"""Prompts with facts planted in a text, and questions about these in the facts' own words and in others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random

from pacellm.calibration.file import KINDS
from pacellm.view import BLOCK

PART = 64
"""Tokens of a block that is voted for."""
SINKS = BLOCK
"""Tokens from the beginning that every question sees; nothing of them is called back. With them among what is voted
for, their end attracts most questions (SmolLM2)."""
WINDOW = BLOCK
"""Tokens before the questions that every question sees."""
MOST = 24
"""Facts of a prompt, one in each block between the two."""
LEAST = 8
"""Facts without which nothing is said about an index."""


NULLS = (
    "What is the capital of Portugal?", "How many legs has a spider?", "Who wrote the national anthem?",
    "At what temperature does water boil?", "Which planet is the largest?", "When did the war end?",
    "What does the word honest mean?", "Why is the sky blue?", "Where do penguins live?", "Which metal rusts?",
    "How is glass made?", "What is the name of your sister?",
)  # fmt: skip
"""Questions that no planted fact answers."""


@dataclass(frozen=True)
class Fact:
    """Tokens of a statement, and of its questions: one of each of ``KINDS``."""

    stated: tuple[int, ...]
    asked: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Planted:
    """A prompt: ``SINKS`` tokens, a block for each fact, ``WINDOW`` tokens.

    Attributes:
        ids: its tokens.
        facts: in the order of their blocks.
    """

    ids: tuple[int, ...]
    facts: tuple[Fact, ...]

    @property
    def end(self) -> int:
        """Tokens that are voted for: all before the window."""
        return len(self.ids) - WINDOW


def text_of_facts() -> str:
    """Lines of statement | question in its words | question in others; written for this."""
    return (files("pacellm.calibration") / "facts.txt").read_text(encoding="utf-8")


def facts_of(written: str, encode: Callable[[str], Sequence[int]]) -> list[Fact]:
    """The facts of such lines that fit into a block."""
    lines = [line.split("|") for line in written.splitlines()]
    found = [Fact(tuple(encode(f" {line[0]}")), tuple(tuple(encode(one)) for one in line[1:])) for line in lines]
    assert all(len(fact.asked) == len(KINDS) for fact in found)
    return [fact for fact in found if len(fact.stated) <= PART]


def plant(ids: Sequence[int], facts: Iterable[Fact], *, seed: int) -> Planted:
    """A prompt of a piece of a text, which goes round where it is short; each fact somewhere in a block of its own."""
    random, facts = Random(seed), tuple(facts)
    length = SINKS + len(facts) * PART + WINDOW
    start = random.randrange(len(ids))
    prompt = [ids[(start + place) % len(ids)] for place in range(length)]
    for number, fact in enumerate(facts):
        place = SINKS + number * PART + random.randrange(PART - len(fact.stated) + 1)
        prompt[place : place + len(fact.stated)] = fact.stated
    return Planted(tuple(prompt), facts)


def two_prompts(ids: Sequence[int], facts: Sequence[Fact], context: int) -> tuple[Planted, Planted] | None:
    """One to choose by and one to report on, with different facts; None where there is no room or too few facts."""
    count = min(MOST, len(facts) // 2, (context - SINKS - WINDOW) // PART)
    if count < LEAST:
        return None
    order = Random(0).sample(list(facts), 2 * count)
    return plant(ids, order[:count], seed=1), plant(ids, order[count:], seed=2)
