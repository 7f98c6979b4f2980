"""A document read once by the engine, and many questions asked from copies of what that left."""

from __future__ import annotations

from collections.abc import Sequence

from pacellm.demo.generator import NOT_STATED, Document, Fact
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.modes import PAChoice
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Delta, Failed, Finished, GenerationRequest, SamplingParams


class DocumentReader:
    """Reads documents into sessions of an engine and asks about them, greedily.

    Args:
        engine: with a tokenizer, used by nobody else meanwhile.
        tokenizer: of the same model.

    Attributes:
        ce_density: part of the experts that answers use; None is the engine's.
    """

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer) -> None:
        self.engine, self._tokenizer = engine, tokenizer
        self._requests = 0
        self.ce_density: float | None = None

    def read(self, document: Document, session: str, pa: PAChoice = "on") -> Finished:
        """Feed a document up to where its questions part, and commit that to a session."""
        opening = _shared(*(prompt_of(self._tokenizer, document, question) for question in ("Who?", "What?")))
        return self._run(opening, SamplingParams(max_tokens=0), session, pa, commit=True)[1]

    def ask(self, document: Document, question: str, session: str, pa: PAChoice = "on") -> tuple[str, Finished]:
        """The answer to a question, from a copy of the session that has read the document."""
        prompt = prompt_of(self._tokenizer, document, question)
        return self._run(prompt, SamplingParams(max_tokens=24, temperature=0), session, pa, commit=False)

    def _run(
        self, ids: list[int], sampling: SamplingParams, session: str, pa: PAChoice, *, commit: bool
    ) -> tuple[str, Finished]:
        self._requests += 1
        name = str(self._requests)
        key = ("demo", session)
        self.engine.add(
            GenerationRequest(name, ids, sampling, session=key, pa=pa, commit=commit, ce_density=self.ce_density)
        )
        events = run_until_idle(self.engine)[name]
        last = events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        return "".join(event.text for event in events if isinstance(event, Delta)), last


def prompt_of(tokenizer: ChatTokenizer, document: Document, question: str) -> list[int]:
    """Ids of a first question about a document."""
    return tokenizer.encode(tokenizer.render([{"role": "user", "content": f"{document.text}\n\n{question}"}]))


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
