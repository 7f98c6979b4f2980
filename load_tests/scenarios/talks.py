"""Conversations with known right answers: a document, then a question about it in every round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from load_tests.scenarios.client import Message, Reply, ask
from pacellm.demo.local import sample_document

FOLLOWING = ("resident", "restored", "replayed")  # what a session may be after its first round


@dataclass(frozen=True)
class Talk:
    """One kind of conversation; every session of a kind must hear the same answers.

    Attributes:
        text: the document. ``questions``, ``answers``: of each round.
    """

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    def messages(self, heard: Sequence[str]) -> list[Message]:
        """The request of the round after the answers that were heard."""
        found = [{"role": "user", "content": f"{self.text}\n\n{self.questions[0]}"}]
        for answer, question in zip(heard, self.questions[1:], strict=False):
            found += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return found


def make_talk(seed: int, rounds: int, tokens: int) -> Talk:
    """A conversation about a document of about ``tokens`` tokens."""
    document = sample_document(max(tokens, 1000), seed)
    facts = [document.facts[number % len(document.facts)] for number in range(rounds)]
    return Talk(document.text, tuple(fact.question for fact in facts), tuple(fact.answer for fact in facts))


async def talk_through(client: httpx.AsyncClient, talk: Talk, session: str | None = None) -> list[Reply]:
    """All rounds, one after the other; each sends the whole history."""
    replies: list[Reply] = []
    for _ in talk.questions:
        replies.append(await ask(client, talk.messages([reply.text for reply in replies]), session))
    return replies


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0.0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and worst in milliseconds."""
    if not seconds:
        return {}
    return {"median_ms": round(1e3 * statistics.median(seconds), 2),
            "p99_ms": round(1e3 * percentile(seconds, 0.99), 2),
            "worst_ms": round(1e3 * max(seconds), 2)}  # fmt: skip
