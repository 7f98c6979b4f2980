"""Questions about a document that was read once, each to a copy of the session that read it."""

from __future__ import annotations

from pacellm.llm import LLM
from pacellm.text.question import question_of
from pacellm.types import Outline

_SESSION = "document"


class Asker:
    """Asks a model; one without a chat template is asked as in a quiz.

    Args:
        llm: what runs it. text: of the document. max_tokens: of an answer.

    Attributes:
        opening: tokens of the prompt before the document's.
    """

    def __init__(self, llm: LLM, text: str, max_tokens: int = 24) -> None:
        self._llm, self._text, self._max_tokens = llm, text, max_tokens
        rendered = self._rendered("?")
        self.opening = len(self._ids(rendered[: rendered.index(text)]))

    def read(self) -> None:
        """Feed the document, up to where questions part, and commit that to a session."""
        self._llm.generate([self._shared()], session=_SESSION, max_tokens=0)

    def ask(self, question: str, max_tokens: int | None = None) -> str:
        """The greedy answer."""
        rendered = self._rendered(question)
        outline = Outline(question=question_of(question, rendered, self._llm.tokenizer.encode_behind))
        answer = self._llm.generate(
            [self._ids(rendered)], session=_SESSION, commit=False, outline=outline, temperature=0,
            max_tokens=max_tokens or self._max_tokens, stop=() if self._has_template else ("\n",),
        )[0]  # fmt: skip
        return str(answer)

    def go_on(self, ids: list[int], max_tokens: int) -> None:
        """Generate behind the document and some more tokens of it, token by token; nothing ends it before."""
        self._llm.generate([[*self._shared(), *ids]], session=_SESSION, commit=False, temperature=0,
                           max_tokens=max_tokens, ignore_eos=True, logprobs=0)  # fmt: skip

    def forget(self) -> None:
        """Delete the session."""
        self._llm.delete(_SESSION)

    def _shared(self) -> list[int]:
        one, other = (self._ids(self._rendered(question)) for question in ("Who?", "What?"))
        return one[: next(n for n, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)]

    @property
    def _has_template(self) -> bool:
        return self._llm.tokenizer.has_chat_template

    def _rendered(self, question: str) -> str:
        if self._has_template:
            return self._llm.tokenizer.render([{"role": "user", "content": f"{self._text}\n\n{question}"}])
        return f"{self._text}\n\nQuestion: {question}\nAnswer:"

    def _ids(self, rendered: str) -> list[int]:
        return self._llm.tokenizer.encode(rendered, add_special_tokens=not self._has_template)
