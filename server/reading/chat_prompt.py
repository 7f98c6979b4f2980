"""A conversation to what the engine needs, the prompt and the answer's form, and to readers of the answer."""

from __future__ import annotations

import dataclasses
from array import array
from dataclasses import dataclass
from functools import partial

from pacellm.text.constraints import Grammar
from pacellm.text.grammar import Grammars
from pacellm.text.question import question_of
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Append, Outline, SamplingParams

from ..writing.parsers import AnswerParser, DialectParser, PlainParser
from .answer_form import AnswerForm
from .appending import AppendedMessages, outline_of
from .chat_input import ChatInput
from .hints import told
from .rendering import check_characters, rendered_input
from .text import text_limit

_SHORT = 2048  # characters: no budget of working memory is so small, and no question so long


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the engine takes it, and what reads the answer.

    Attributes:
        ids: of the prompt; of what follows the history where it appends.
        sampling: for the engine.
        grammar: what the whole answer must look like; None where it is free.
        parsers: of the answer's text, one for each choice.
        outline: of the prompt, for its session. append: what makes it of the session's history.
        texts: of the messages as they were sent.
    """

    ids: array[int]
    sampling: SamplingParams
    grammar: Grammar | None
    parsers: list[AnswerParser]
    outline: Outline
    append: Append | None
    texts: tuple[str, ...]


class RenderedChat:
    """A conversation that is rendered and not yet tokenised. Slow on long prompts: used off the event loop.

    Args:
        tokenizer: of the model.
        grammars: knows which texts are special tokens.
        asked: the request.
        limit: the model's context; what is longer for certain is refused before it is rendered or tokenised.

    Raises:
        RequestError: the template refuses it, or behind any history, or its fields contradict each other.
    """

    def __init__(self, tokenizer: ChatTokenizer, grammars: Grammars, asked: ChatInput, limit: int | None) -> None:
        self._texts = tuple(message.text() for message in asked.messages)
        asked = told(tokenizer, asked)
        self._tokenizer, self._asked = tokenizer, asked
        self._limit = text_limit(limit, is_cut=asked.is_truncated)
        check_characters(tokenizer, asked.messages, self._limit)
        self._form = AnswerForm(tokenizer.dialect, grammars, asked)
        self._appended = AppendedMessages(tokenizer, asked) if asked.appends else None
        self._rendered = rendered_input(tokenizer, asked) if self._appended is None else self._appended.text

    @property
    def size(self) -> int:
        """Characters to tokenise."""
        return len(self._rendered)

    @property
    def needs_log(self) -> bool:
        """Which tokens it comes to depends on what its session has generated."""
        return self._appended is None and self._tokenizer.literals.has_own(self._rendered)

    def tokenized(self, sampling: SamplingParams, scope: str | None, logged: array[int] | None) -> ChatPrompt:
        """All that it comes to.

        Args:
            scope: whose texts these are, as tenant and session; long pieces are remembered within it.
            logged: ids of the session that it goes on.

        Raises:
            RequestError: it is too long.
        """
        append = None
        if self._appended is not None:
            ids, append = self._appended.encoded(self._limit, scope)
        else:
            ids = self._tokenizer.encode_chat(self._rendered, limit=self._limit, scope=scope, logged=logged)
        outline = Outline() if scope is None else outline_of(self._tokenizer, self._asked, ids)
        if self._appended is not None or len(self._rendered) > _SHORT:
            said = self._tokenizer.literals.shielded(self._asked.messages[-1].text()[-_SHORT:])
            encode = partial(self._tokenizer.encode_behind, is_chat=True)
            outline = dataclasses.replace(outline, question=question_of(said, self._rendered, encode))
        if self._form.dialect.template is not None:
            sampling = dataclasses.replace(sampling, skip_special_tokens=False)  # marks may be special tokens
        grammar = self._form.grammar(self._rendered)
        return ChatPrompt(array("i", ids), sampling, grammar, self._parsers(), outline, append, self._texts)

    def _parsers(self) -> list[AnswerParser]:
        asked, dialect = self._asked, self._form.dialect
        tools = [tool.shown() for tool in asked.tools]
        special = self._tokenizer.special_texts if asked.skip_special_tokens else ()
        parsers: list[AnswerParser] = []
        for _ in range(asked.n):
            own = self._tokenizer.response_parser(dialect, self._rendered, tools, continues=asked.continues)
            parser = PlainParser() if own is None else DialectParser(own, dialect, special)
            parsers.append(self._form.parser(parser))
        return parsers
