"""What an answer may look like: free text, a form that was asked for, and calls of tools as the model writes them."""

from __future__ import annotations

from pacellm.errors import UnsupportedParameter
from pacellm.text import constraints
from pacellm.text.constraints import Function, Grammar, Mark
from pacellm.text.dialect import Dialect
from pacellm.text.grammar import Grammars

from ..writing.parsers import AnswerParser, GenericToolParser, ToolListParser
from .chat_input import ChatInput
from .tools import NamedTool

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class AnswerForm:
    """What the answer of one request may look like.

    Args:
        dialect: the model's.
        grammars: knows which texts are special tokens.
        asked: the request.

    Raises:
        UnsupportedParameter: what cannot be had with this model.
    """

    def __init__(self, dialect: Dialect, grammars: Grammars, asked: ChatInput) -> None:
        self._model, self._grammars, self._asked = dialect, grammars, asked
        self._format, self._choice = asked.format, asked.choice
        self._is_forced = self._choice == "required" or isinstance(self._choice, NamedTool)
        self._has_tools = dialect.has_tools or not asked.tools
        self._is_marked = dialect.call is not None and dialect.has_tools
        # an answer that is gone on with has begun before
        self._is_generic = not self._has_tools and (self._is_forced or not asked.continues)
        if self._choice == "auto" and self._has_tools and not self._is_marked:
            self._check_auto()

    def parser(self, parser: AnswerParser) -> AnswerParser:
        """A parser of the answer.

        Args:
            parser: tells content from reasoning, and finds calls where they are written in the model's own way.
        """
        if self._is_generic:
            return GenericToolParser(parser)
        is_list = self._is_forced and self._has_tools and not self._is_marked
        return ToolListParser(parser) if is_list else parser

    @property
    def dialect(self) -> Dialect:
        """What the answer is read by."""
        finds_calls = self._choice == "auto" or (self._is_forced and self._is_marked)
        return self._model if finds_calls and self._has_tools else self._model.without_calls()

    def grammar(self, prompt: str) -> Grammar | None:
        """The whole answer's form.

        Args:
            prompt: rendered.
        """
        found = self._found()
        if found is None or self._model.think is None:
            return found
        mark = self._mark(self._model.think)
        is_open = self._model.is_thinking(prompt, continues=self._asked.continues)
        has_text = self._choice == "auto" and self._format is None and not self._is_generic
        if has_text and not is_open and mark.tokens is None:
            return found  # reasoning is text like any other
        return constraints.after_reasoning(found, mark, is_open=is_open)

    def _found(self) -> Grammar | None:
        """The form of what follows reasoning."""
        only_one = self._asked.only_one or isinstance(self._choice, NamedTool)
        if self._is_generic:
            functions = [] if self._choice == "none" else self._functions()
            only_one |= self._choice == "auto" and not self._asked.several  # weak models do not stop calling
            return constraints.of_generic_answer(
                functions, only_one=only_one, is_forced=self._is_forced, otherwise=self._format
            )
        if self._is_forced and not self._is_marked:
            return constraints.of_calls(self._functions(), only_one=only_one)
        if not self._is_marked or self._choice == "none":
            return self._format
        assert self._model.call is not None
        mark = self._mark(self._model.call)
        if self._is_forced:
            return constraints.of_marked_calls(self._functions(), mark, only_one=only_one)
        has_text = self._format is None
        return constraints.of_marked_calls(
            self._functions(), mark, only_one=only_one, with_text=has_text, otherwise=self._format
        )

    def _functions(self) -> list[Function]:
        """Those that may be called."""
        only = self._choice.function.name if isinstance(self._choice, NamedTool) else None
        return [
            Function(
                tool.function.name,
                f"tools.{number}.function.parameters",
                _NO_ARGUMENTS if tool.function.parameters is None else tool.function.parameters,
                is_strict=tool.function.strict is True,
            )
            for number, tool in enumerate(self._asked.tools)
            if only in (None, tool.function.name)
        ]

    def _mark(self, marks: tuple[str, str]) -> Mark:
        begin, end = (self._grammars.special(text) for text in marks)
        return Mark(*marks, tokens=None if begin is None or end is None else (begin, end))

    def _check_auto(self) -> None:
        """Refuse what cannot be had where calls are found in free text."""
        if self._asked.only_one:
            raise UnsupportedParameter(
                "parallel_tool_calls false with tool_choice auto is not supported with this model",
                param="parallel_tool_calls",
            )
        if self._format is not None:
            raise UnsupportedParameter(
                "response_format with tool_choice auto is not supported with this model", param="response_format"
            )
        for number, tool in enumerate(self._asked.tools):
            if tool.function.strict:
                raise UnsupportedParameter(
                    "strict with tool_choice auto is not supported with this model",
                    param=f"tools.{number}.function.strict",
                )
