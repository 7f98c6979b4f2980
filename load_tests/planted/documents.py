"""Prose with facts in it, each asked for in its words and, where the fact is a written one, in others."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacellm.demo.generator import make_document

WRITTEN = Path(__file__).with_name("facts.txt")
"""Lines of statement | question in its words | question in others | a word of the answer. None of these facts is one
that a calibration chooses by."""


@dataclass(frozen=True)
class Planted:
    """A fact of a document.

    Attributes:
        questions: by words, ``own`` and perhaps ``other``.
        answer: what a right answer has in it.
        place: tokens of the document before the statement. length: of the statement, in tokens.
    """

    questions: dict[str, str]
    answer: str
    place: int
    length: int


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str
    facts: list[Planted]


def synthetic(length: int, num_facts: int, seed: int, tokenizer: Any) -> Text:
    """The demo's: filler with its facts in between."""
    document = make_document(length, num_facts, seed, tokenizer)
    facts = [Planted({"own": one.question}, one.answer, int(one.depth * length), 16) for one in document.facts]
    return Text(document.text, facts)


def prose(texts: Path, length: int, num_facts: int, seed: int, tokenizer: Any, *, written: bool) -> Text:
    """Facts spread over the prose of a folder, each behind the end of a sentence.

    Args:
        texts: a folder of ``*.txt``.
        written: those of :data:`WRITTEN` instead of the demo's.
    """
    rng = random.Random(seed)
    files = sorted(texts.glob("*.txt"))
    rng.shuffle(files)
    told = _written(num_facts, rng) if written else _generated(num_facts, seed, tokenizer)
    text = ""
    while len(text) < 6 * length:
        text += files[len(text) % len(files)].read_text() + "\n\n"
    ids, per = tokenizer.encode(text)[:length], length // num_facts
    parts: list[str] = []
    facts: list[Planted] = []
    for number, (statement, questions, answer) in enumerate(told):
        part = tokenizer.decode(ids[number * per : (number + 1) * per])
        place = part.find(". ", len(part) // 2) + 1 or len(part)
        before = number * per + len(tokenizer.encode(part[:place]))  # of the prose; the statements come on top
        before += sum(one.length for one in facts)
        facts.append(Planted(questions, answer, before, len(tokenizer.encode(" " + statement))))
        parts.append(f"{part[:place]} {statement}{part[place:]}")
    return Text("".join(parts), facts)


def _written(count: int, rng: random.Random) -> list[tuple[str, dict[str, str], str]]:
    lines = [line.split("|") for line in WRITTEN.read_text(encoding="utf-8").splitlines()]
    return [(line[0], {"own": line[1], "other": line[2]}, line[3]) for line in rng.sample(lines, count)]


def _generated(count: int, seed: int, tokenizer: Any) -> list[tuple[str, dict[str, str], str]]:
    document = make_document(60 * count, count, seed, tokenizer)
    sentences = [part + "." for part in document.text.split(". ")]
    found = []
    for fact in document.facts:
        sentence = next(one for one in sentences if fact.answer in one)
        found.append((sentence.rstrip(".") + ".", {"own": fact.question}, fact.answer))
    return found
