"""Prompts with facts planted in a text, and what asks for them: tokens alone, so that they are there for every model.

A fact is a few words and what they stand for, words too. It is asked for by its words, written in another way where
the vocabulary has them so (``harbour``, `` Harbour``, ``HARBOUR``): an index that knew spelling alone would find half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

PART = 64
"""Tokens of a block that votes are counted for."""
SINKS = PART
"""Tokens from the beginning that every question sees."""
_KEY, _VALUE = 3, 3
_LETTERS = 4
_ENOUGH = 100


@dataclass(frozen=True)
class Planted:
    """A prompt and its questions.

    Attributes:
        ids: the first ``SINKS`` and the last ``window`` without facts, in every block between them one.
        window: tokens at the end that every question sees.
        questions: tokens of each. blocks: which has its fact, counted from the beginning.
    """

    ids: tuple[int, ...]
    window: int
    questions: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]


class Words:
    """Words of a vocabulary and how else they are written.

    Args:
        ids: a text; words of it are taken, and where these are few, others.
        vocabulary: the number of tokens.
        decode: the text of a token.
    """

    def __init__(self, ids: Sequence[int], vocabulary: int, decode: Callable[[int], str]) -> None:
        spellings: dict[str, list[int]] = {}
        for token in range(vocabulary):
            word = decode(token).strip()
            if len(word) >= _LETTERS and word.isalpha():
                spellings.setdefault(word.lower(), []).append(token)
        known = set(ids)
        groups = list(spellings.values())
        for found in (
            [group for group in groups if len(group) > 1 and not known.isdisjoint(group)],
            [group for group in groups if not known.isdisjoint(group)],
            [[token] for token in sorted(known)],
        ):
            self.groups = found
            if len(found) >= _ENOUGH:
                break

    def fact(self, random: Random) -> tuple[list[int], list[int]]:
        """(a fact, what asks for it)."""
        chosen = random.sample(self.groups, _KEY + _VALUE)
        stated = [random.choice(group) for group in chosen]
        asked = [
            random.choice([token for token in group if token != own] or [own])
            for group, own in zip(chosen[:_KEY], stated, strict=False)
        ]
        return stated, asked


def plant(ids: Sequence[int], words: Words, *, facts: int, window: int, seed: int) -> Planted:
    """A prompt of a piece of a text, a fact in every block.

    Args:
        ids: the text, at least as long as the prompt. facts: blocks between its beginning and its window.
    """
    random = Random(seed)
    length = SINKS + facts * PART + window
    start = random.randrange(len(ids) - length + 1)
    prompt = list(ids[start : start + length])
    questions, blocks = [], list(range(SINKS // PART, SINKS // PART + facts))
    for block in blocks:
        stated, asked = words.fact(random)
        place = block * PART + random.randrange(PART - len(stated) + 1)
        prompt[place : place + len(stated)] = stated
        questions.append(tuple(asked))
    return Planted(tuple(prompt), window, tuple(questions), tuple(blocks))
