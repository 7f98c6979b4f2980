"""A document read once into a session, and many questions asked from copies of what that left."""

from __future__ import annotations

from collections.abc import Sequence

from pacellm.completion import Completion
from pacellm.demo.generator import NOT_STATED, Document, Fact
from pacellm.llm import LLM
from pacellm.modes import PAChoice
from pacellm.text.question import question_of
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Outline


def read(llm: LLM, document: Document, session: str, pa: PAChoice = "on") -> Completion:
    """Feed a document up to where its questions part, and commit that to a session."""
    opening = _shared(*(prompt_of(llm.tokenizer, document, question) for question in ("Who?", "What?")))
    return llm.generate([opening], session=session, pa=pa, max_tokens=0)[0]


def ask(
    llm: LLM, document: Document, question: str, session: str, pa: PAChoice = "on", density: float | None = None
) -> Completion:
    """The greedy answer to a question, from a copy of the session that has read the document.

    Args:
        density: part of the experts that the answer uses; None is the engine's.
    """
    tokenizer = llm.tokenizer
    rendered = _rendered(tokenizer, document, question)
    outline = Outline(question=question_of(question, rendered, tokenizer.encode_behind))
    return llm.generate(
        [tokenizer.encode(rendered)], session=session, pa=pa, commit=False, ce_density=density, outline=outline,
        max_tokens=24, temperature=0,
    )[0]  # fmt: skip


def prompt_of(tokenizer: ChatTokenizer, document: Document, question: str) -> list[int]:
    """Ids of a first question about a document."""
    return tokenizer.encode(_rendered(tokenizer, document, question))


def _rendered(tokenizer: ChatTokenizer, document: Document, question: str) -> str:
    return tokenizer.render([{"role": "user", "content": f"{document.text}\n\n{question}"}])


def questions_of(document: Document, num_stated: int, num_unknown: int) -> list[Fact]:
    """Facts to ask about, spread evenly over the document's depth, and questions without an answer (depth -1)."""
    step = len(document.facts) / num_stated
    stated = [document.facts[int((number + 0.5) * step)] for number in range(num_stated)]
    return stated + [Fact(question, NOT_STATED, -1.0) for question in document.unknown_questions[:num_unknown]]


def _shared(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The common beginning of two prompts."""
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return list(one[:number])
    return list(one)
