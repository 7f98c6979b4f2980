"""Synthetic documents: filler sentences with facts in between, and questions about the facts.

A fact reads "The access code of the amber archive is 48213."; its *key* is "access code of the amber archive" and
appears word for word in the question, so that finding it is a match of a short n-gram. Questions without an answer
in the document differ from a stated fact in one part of the key (adjective, noun or attribute), or in all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pacellm.demo import words

NOT_STATED = "Not stated in the document."

QUESTIONS = (
    "What is the {key}?",
    "What is the {key}?",
    "Tell me the {key}.",
    "Please give me the {key}.",
    "According to the document, what is the {key}?",
    "Do you know the {key}?",
    "And the {key}?",
)

STATEMENTS = (
    "The {key} is {value}.",
    "The {key} is {value}.",
    "Note that the {key} is {value}.",
    "The {key} is now {value}.",
    "As everyone knows, the {key} is {value}.",
    "It says here that the {key} is {value}.",
)

FILLERS = (
    "It was a {weather} day and the {noun} stayed closed.",
    "The weather in {city} was {weather} {time}.",
    "{name} {verb} the {things} {time}.",
    "{name} and {name2} walked to the {noun} {time}.",
    "Nobody at the {adj} {noun} had seen the {things} {time}.",
    "The {adj} {noun} is older than the {adj2} {noun2}.",
    "There were {number} {things} on the floor, and most of them were {colour}.",
    "A train from {city} to {city2} takes {number} minutes.",
    "{name} wrote a long letter about the {weather} weather in {city}.",
    "On {weekday} the workers {verb} {number} {things}.",
    "In {month} the {adj} {noun} was quiet, and few people came.",
    "The {things} were {verb} by {name} and then sent to {city}.",
    "Some visitors said that the {noun} needs new {things}.",
    "{name} likes {colour} {things} more than {colour2} ones.",
    "We waited for {number} hours, but the {things} never came.",
    "The road to the {noun} was {weather} and long.",
    "In {year}, {name} left {city} and bought a {adj} {noun}.",
    "People often ask about the {attribute}, but few remember it.",
    "The old {attribute} was written in a book that {name} lost {time}.",
    "Page {number} of the report describes the {adj} {noun} and its {things}.",
    "Both the {noun} and the {noun2} are open on {weekday}.",
    "If the {things} are missing, ask {name} for help.",
    "She said: the {noun} is not far from here, only {number} steps.",
    "He had a {password} and a {password2} in his bag {time}.",
    "The committee met at the {adj} {noun} {time} and talked about {things}.",
    "Then {name} opened the door, and a {colour} bird flew out.",
    "They sold {number} {things} to a merchant from {city}.",
    "Nothing else happened {time}.",
    "The story goes on in the next part.",
    "Many years ago a {password} was painted on the wall of the {noun}.",
)


def _digits(count: int) -> Callable[[random.Random], str]:
    return lambda rng: "".join(rng.choice("0123456789") for _ in range(count))


def _one_of(values: tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


#: attribute -> how its value is drawn
ATTRIBUTES: dict[str, Callable[[random.Random], str]] = {
    "access code": _digits(5),
    "phone number": _digits(7),
    "founding year": lambda rng: str(rng.randint(1500, 2020)),
    "crate count": lambda rng: str(rng.randint(11, 999)),
    "paint colour": _one_of(words.COLOURS),
    "home city": _one_of(words.CITIES),
    "head keeper": _one_of(words.NAMES),
    "secret word": _one_of(words.PASSWORDS),
    "opening day": _one_of(words.WEEKDAYS),
    "inspection date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}",
}


class Tokenizer(Protocol):
    """What :func:`make_document` needs of a tokenizer; it must not add special tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True)
class Key:
    """What a question asks for: an attribute of an entity."""

    attribute: str
    adjective: str
    noun: str

    def __str__(self) -> str:
        return f"{self.attribute} of the {self.adjective} {self.noun}"


@dataclass(frozen=True)
class Fact:
    """A question, its exact answer and where it is stated: ``depth`` 0 is the document's start, 1 its end."""

    question: str
    answer: str
    depth: float


@dataclass
class Document:
    """A document with the facts it states, in the order of their depth."""

    text: str
    facts: list[Fact] = field(default_factory=list)
    unknown_questions: list[str] = field(default_factory=list)


def filler_sentence(rng: random.Random) -> str:
    """One sentence that states no fact."""
    pick = rng.choice
    return pick(FILLERS).format(
        adj=pick(words.ADJECTIVES), adj2=pick(words.ADJECTIVES), noun=pick(words.NOUNS), noun2=pick(words.NOUNS),
        name=pick(words.NAMES), name2=pick(words.NAMES), city=pick(words.CITIES), city2=pick(words.CITIES),
        colour=pick(words.COLOURS), colour2=pick(words.COLOURS), weather=pick(words.WEATHER), things=pick(words.THINGS),
        verb=pick(words.VERBS), time=pick(words.TIMES), weekday=pick(words.WEEKDAYS), month=pick(words.MONTHS),
        password=pick(words.PASSWORDS), password2=pick(words.PASSWORDS), attribute=pick(tuple(ATTRIBUTES)),
        number=rng.randint(2, 999), year=rng.randint(1500, 2020),
    )  # fmt: skip


def question_text(key: Key, rng: random.Random) -> str:
    """A question about ``key`` in one of several phrasings."""
    return rng.choice(QUESTIONS).format(key=key)


def draw_keys(count: int, rng: random.Random) -> list[Key]:
    """``count`` different keys; half of the time from small word pools, so that many keys share parts."""
    pools: list[list[str]] = [list(ATTRIBUTES), list(words.ADJECTIVES), list(words.NOUNS)]
    if rng.random() < 0.5:
        side = max(2, round((2 * count) ** (1 / 3)) + 1)
        pools = [rng.sample(pool, min(side, len(pool))) for pool in pools]
        while len(pools[0]) * len(pools[1]) * len(pools[2]) < 2 * count:
            side += 1
            pools[1:] = [rng.sample(pool, min(side, len(pool))) for pool in (words.ADJECTIVES, words.NOUNS)]
    keys: dict[Key, None] = {}
    while len(keys) < count:
        keys[Key(*(rng.choice(pool) for pool in pools))] = None
    return list(keys)


def unknown_keys(count: int, known: list[Key], rng: random.Random) -> list[Key]:
    """``count`` keys that are not in ``known``; most share all but one part with one that is."""
    taken = set(known)
    unknown: list[Key] = []
    while len(unknown) < count:
        attribute, adjective, noun = (rng.choice(p) for p in (tuple(ATTRIBUTES), words.ADJECTIVES, words.NOUNS))
        if known and (part := rng.randrange(4)) < 3:
            near = rng.choice(known)
            attribute = attribute if part == 0 else near.attribute
            adjective = adjective if part == 1 else near.adjective
            noun = noun if part == 2 else near.noun
        key = Key(attribute, adjective, noun)
        if key not in taken:
            taken.add(key)
            unknown.append(key)
    return unknown


def make_document(
    num_tokens: int, num_facts: int, seed: int, tokenizer: Tokenizer, num_unknown: int | None = None
) -> Document:
    """A document of at most ``num_tokens`` tokens (and within one sentence of it) that states ``num_facts`` facts.

    The facts are spread evenly with jitter. ``num_unknown`` questions without an answer come along, by default one
    for every four facts and at least four. The same arguments give the same document.

    Raises:
        ValueError: the facts do not fit into ``num_tokens``.
    """
    rng = random.Random(seed)
    keys = draw_keys(num_facts, rng)
    values = [ATTRIBUTES[key.attribute](rng) for key in keys]
    stated = [_capital(rng.choice(STATEMENTS).format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    sentences, positions = _place(
        [_sized(" " + sentence, tokenizer) for sentence in stated], num_tokens, rng, tokenizer
    )
    starts = [0, *itertools.accumulate(sentence.size for sentence in sentences)]
    facts = [
        Fact(question_text(key, rng), value, round(starts[position] / starts[-1], 4))
        for key, value, position in zip(keys, values, positions, strict=True)
    ]
    unknown = unknown_keys(max(4, num_facts // 4) if num_unknown is None else num_unknown, keys, rng)
    text = "".join(sentence.text for sentence in sentences).lstrip()
    return Document(text, facts, [question_text(key, rng) for key in unknown])


class _Sentence(NamedTuple):
    """A sentence with the space or line break before it, and its tokens."""

    text: str
    size: int


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _sized(text: str, tokenizer: Tokenizer) -> _Sentence:
    # The tokenizer puts a space before a text that begins with a line break; within a document there is none.
    return _Sentence(text, len(tokenizer.encode(text)) - text.startswith("\n"))


def _fillers(rng: random.Random, tokenizer: Tokenizer, budget: int) -> Iterator[_Sentence]:
    """Filler sentences until the next one would not fit into ``budget`` tokens."""
    while True:
        sentence = _sized(rng.choice((" ",) * 7 + ("\n",)) + filler_sentence(rng), tokenizer)
        budget -= sentence.size
        if budget < 0:
            return
        yield sentence


def _place(
    stated: list[_Sentence], num_tokens: int, rng: random.Random, tokenizer: Tokenizer
) -> tuple[list[_Sentence], list[int]]:
    """All sentences in order, and the position of every fact among them."""
    budget = num_tokens - sum(sentence.size for sentence in stated)
    if budget < 0:
        raise ValueError(f"{len(stated)} facts need {num_tokens - budget} tokens, more than num_tokens={num_tokens}")
    fillers = list(_fillers(rng, tokenizer, budget))
    sentences: list[_Sentence] = []
    positions: list[int] = []
    used = 0
    for index, fact in enumerate(stated):
        cut = int(len(fillers) * (index + rng.random()) / len(stated))
        sentences.extend(fillers[used:cut])
        used = max(used, cut)
        positions.append(len(sentences))
        sentences.append(fact)
    return sentences + fillers[used:], positions
