"""Prose with statements that more than one place of it answers: two hops, variables, counts, a list."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PEOPLE = ("Marta", "Olaf", "Priya", "Tomas", "Ingrid", "Samuel", "Yuki", "Leila", "Bruno", "Zofia", "Dmitri", "Carmen")
_THINGS = ("violin", "compass", "telescope", "passport", "lantern", "diary", "typewriter", "camera", "saddle", "globe")
_PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Quebec", "Nairobi", "Vienna", "Seoul", "Havana", "Dublin")
_GUESTS = (
    "Abbott", "Barlow", "Castell", "Dunmore", "Eastman", "Farrow", "Gillam", "Harker", "Ibsen", "Jarvis", "Kessler",
    "Lomax", "Marchetti", "Norwood", "Oakley", "Pettit", "Quigley", "Renfrew", "Sorensen", "Tarleton", "Upshaw",
    "Vickers", "Wexford", "Yardley", "Zeller",
)  # fmt: skip
_BIRDS = ("herons", "falcons", "magpies")
_SHORT, _LONG = 24, 160  # tokens of an answer


@dataclass(frozen=True)
class Task:
    """A question.

    Attributes:
        kind: of task. wanted: what a whole answer names.
        max_tokens: of an answer.
    """

    kind: str
    question: str
    wanted: tuple[str, ...]
    max_tokens: int = _SHORT

    def score(self, answer: str) -> float:
        """The part of what is wanted that an answer names."""
        words = set(re.findall(r"\w+", answer))
        return sum(one in words for one in self.wanted) / len(self.wanted)


@dataclass(frozen=True)
class TaskText:
    """A document, what to ask about it, and how its prose goes on."""

    text: str
    tasks: list[Task]
    continuation: str


def task_text(texts: Path, length: int, seed: int, tokenizer: Any, *, behind: int) -> TaskText:
    """Prose of a folder with statements between its sentences, and the ``behind`` tokens that follow it."""
    rng = random.Random(seed)
    files = sorted(texts.glob("*.txt"))
    rng.shuffle(files)
    statements, tasks = _statements(rng)
    text = ""
    while len(text) < 6 * (length + behind):
        text += files[len(text) % len(files)].read_text() + "\n\n"
    used = length - len(tokenizer.encode(" ".join(statements)))
    prose = tokenizer.decode(tokenizer.encode(text)[:used])
    cut = prose.rindex(". ") + 1
    rest = tokenizer.decode(tokenizer.encode(text[cut:].lstrip())[:behind])
    return TaskText(_spread(prose[:cut], statements), tasks, rest)


def _spread(prose: str, statements: list[str]) -> str:
    parts, per = [], len(prose) // len(statements)
    for number, statement in enumerate(statements):
        part = prose[number * per : (number + 1) * per if number + 1 < len(statements) else None]
        place = part.find(". ", len(part) // 2) + 1 or len(part)
        parts.append(f"{part[:place]} {statement}{part[place:]}")
    return "".join(parts)


def _statements(rng: random.Random) -> tuple[list[str], list[Task]]:
    """In the order of the document, but for what must follow something else, and the tasks about them."""
    found = [_two_hops(rng), _variables(rng), _counts(rng), _list(rng)]
    statements = [statement for stated, _ in found for statement in stated]
    rng.shuffle(statements)
    return statements, [task for _, tasks in found for task in tasks]


def _two_hops(rng: random.Random) -> tuple[list[str], list[Task]]:
    stated, tasks = [], []
    people, places = rng.sample(_PEOPLE, 6), rng.sample(_PLACES, 6)
    for person, thing, place in zip(people, rng.sample(_THINGS, 6), places, strict=True):
        stated += [f"The {thing} belongs to {person}.", f"{person} lives in {place}."]
        tasks.append(Task("two hops", f"In which city does the owner of the {thing} live?", (place,)))
    return stated, tasks


def _variables(rng: random.Random) -> tuple[list[str], list[Task]]:
    stated, tasks = [], []
    names = rng.sample([f"{a}{b}" for a in "ABCDEFGH" for b in "KLMNPQRS"], 8)
    for chain in (names[:4], names[4:]):
        value = rng.randint(10000, 99999)
        stated.append(f"VAR {chain[0]} = {value}.")
        stated += [f"VAR {later} = VAR {earlier}." for earlier, later in itertools.pairwise(chain)]
        question = f"Which variables have the value {value}, directly or through other variables? Name all four."
        tasks.append(Task("variables", question, tuple(chain), 40))
    return stated, tasks


def _counts(rng: random.Random) -> tuple[list[str], list[Task]]:
    stated, tasks = [], []
    for bird in _BIRDS:
        count = rng.randint(3, 9)
        stated += [f"Somebody saw {bird} in {place}." for place in rng.sample(_PLACES, count)]
        question = f"In how many cities did somebody see {bird}? Answer with a number."
        tasks.append(Task("counting", question, (str(count),)))
    return stated, tasks


def _list(rng: random.Random) -> tuple[list[str], list[Task]]:
    guests = tuple(rng.sample(_GUESTS, 20))
    question = "Who was invited to the banquet? List all twenty names."
    return [f"{name} was invited to the banquet." for name in guests], [Task("list of 20", question, guests, _LONG)]
