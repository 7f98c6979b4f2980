"""An answer's text to the pieces of a message: content, reasoning, calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from pacellm.text.dialect import ANSWER, CALL, REASONING, Dialect

from .tool_calls import MessageDelta, ToolCallScanner, as_json, begun, continued

_ANSWER_END = ANSWER.replace("<", "</")


class AnswerParser(Protocol):
    """Reads one choice."""

    @property
    def num_calls(self) -> int:
        """Calls so far."""

    def push(self, text: str) -> list[MessageDelta]:
        """What new text adds to the message."""

    def finish(self) -> list[MessageDelta]:
        """What is left once no more text comes."""


class PlainParser:
    """Everything is content."""

    num_calls = 0

    def push(self, text: str) -> list[MessageDelta]:
        """The text, also where it is empty."""
        return [{"content": text}]

    def finish(self) -> list[MessageDelta]:
        """Nothing."""
        return []


class DialectParser:
    """What transformers' response parser makes of it.

    Args:
        parser: at the answer's beginning (``pacellm/text/response_parser.py``).
        dialect: that the parser reads.
        special: tokens to leave out of content and reasoning.
    """

    def __init__(self, parser: Any, dialect: Dialect, special: Sequence[str]) -> None:
        self._parser, self._dialect = parser, dialect
        self._special = re.compile("|".join(re.escape(text) for text in special)) if special else None
        self._scanner: ToolCallScanner | None = None
        self.num_calls = 0

    def push(self, text: str) -> list[MessageDelta]:
        """What is certain by now."""
        return self._read(self._parser.feed(text))

    def finish(self) -> list[MessageDelta]:
        """What the parser held back."""
        return self._read(self._parser.finish())

    def _read(self, events: list[dict[str, Any]]) -> list[MessageDelta]:
        out: list[MessageDelta] = []
        for event in events:
            if event["field"] == "tool_calls":
                out += self._scan(event) if self._dialect.call is not None else self._call(event)
            elif event["type"] == "region_chunk":
                out += self._shown("reasoning" if event["field"] in REASONING else "content", event["text"])
        return out

    def _shown(self, field: str, text: str) -> list[MessageDelta]:
        if self._special is not None:
            text = self._special.sub("", text)
        if not text:
            return []
        return [{"content": text} if field == "content" else {"reasoning_content": text, "reasoning": text}]

    def _scan(self, event: dict[str, Any]) -> list[MessageDelta]:
        """A call that is passed on as it is written."""
        if event["type"] == "region_open":
            self._scanner = ToolCallScanner(self.num_calls)
        if self._scanner is None:
            return []
        if event["type"] == "region_chunk":
            return self._scanner.push(event["text"])
        if event["type"] == "region_close":
            begun_calls = self._scanner.num_calls + self._scanner.is_inside
            is_none, self.num_calls, self._scanner = begun_calls == self.num_calls, begun_calls, None
            return self._shown("content", event["raw"]) if is_none else []
        return []

    def _call(self, event: dict[str, Any]) -> list[MessageDelta]:
        """A call, or several, read when they are whole."""
        if event["type"] != "region_close":
            return []
        functions = _functions_of(event["value"])
        if not functions:
            return self._shown("content", event["raw"])
        out: list[MessageDelta] = []
        for function in functions:
            arguments = function.get("arguments", {})
            out.append(begun(self.num_calls, str(function["name"])))
            written = arguments if isinstance(arguments, str) else as_json(arguments)
            out.append(continued(self.num_calls, written.removesuffix("}") if self._parser.is_cut else written))
            self.num_calls += 1
        return out


def _functions_of(value: Any) -> list[dict[str, Any]]:
    """The functions of one call or a list of calls; none where one of them has no name."""
    calls = value if isinstance(value, list) else [value]
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    are_named = all(isinstance(function, dict) and "name" in function for function in functions)
    return functions if are_named and len(functions) == len(calls) else []


class ToolListParser:
    """Content that is a JSON list of calls.

    Args:
        reader: tells content from reasoning.
    """

    def __init__(self, reader: AnswerParser) -> None:
        self._reader, self._scanner = reader, ToolCallScanner()

    @property
    def num_calls(self) -> int:
        """Calls so far, one that is being written included."""
        return self._scanner.num_calls + self._scanner.is_inside

    def push(self, text: str) -> list[MessageDelta]:
        """Calls instead of content."""
        return self._scanned(self._reader.push(text))

    def finish(self) -> list[MessageDelta]:
        """Calls instead of content, and what ended before it became one."""
        out = self._scanned(self._reader.finish())
        rest = "" if self.num_calls else self._scanner.finish()
        return [*out, {"content": rest}] if rest else out

    def _scanned(self, deltas: list[MessageDelta]) -> list[MessageDelta]:
        return [
            piece
            for delta in deltas
            for piece in (self._scanner.push(delta["content"]) if "content" in delta else [delta])
        ]


class GenericToolParser:
    """Content that begins with the mark of an answer or of a call (``server/reading/generic_tools.py``).

    Args:
        reader: tells content from reasoning.
    """

    def __init__(self, reader: AnswerParser) -> None:
        self._reader, self._held = reader, ""
        self._scanner: ToolCallScanner | None = None
        self._is_text = False

    @property
    def num_calls(self) -> int:
        """Calls so far, one that is being written included."""
        return 0 if self._scanner is None else self._scanner.num_calls + self._scanner.is_inside

    def push(self, text: str) -> list[MessageDelta]:
        """What is certain by now, without marks."""
        return self._read(self._reader.push(text))

    def finish(self) -> list[MessageDelta]:
        """What is left; a mark that was cut is nothing, and so is one that closes the answer."""
        out = self._read(self._reader.finish())
        if self._is_text and self._held.rstrip() != _ANSWER_END:
            out += [{"content": self._held}] if self._held else []
        rest = "" if self._scanner is None or self.num_calls else CALL[0] + self._scanner.finish()
        return [*out, {"content": rest}] if rest else out

    def _read(self, deltas: list[MessageDelta]) -> list[MessageDelta]:
        return [
            piece for delta in deltas for piece in (self._take(delta["content"]) if "content" in delta else [delta])
        ]

    def _take(self, text: str) -> list[MessageDelta]:
        if self._is_text:
            return self._text(text)
        if self._scanner is not None:
            return self._scanner.push(text)
        self._held += text
        if self._held.startswith(CALL[0]):
            self._scanner = ToolCallScanner()
            return self._scanner.push(self._held.removeprefix(CALL[0]))
        if any(mark.startswith(self._held) and mark != self._held for mark in (CALL[0], ANSWER)):
            return []
        self._is_text, begun, self._held = True, self._held.removeprefix(ANSWER), ""
        return self._text(begun)

    def _text(self, text: str) -> list[MessageDelta]:
        """Text without what may be the mark that closes it, which nobody asked for and many models write."""
        text = self._held + text
        last = text[text.rfind("<") :] if "<" in text else ""
        self._held = last if last and (_ANSWER_END.startswith(last) or last.rstrip() == _ANSWER_END) else ""
        text = text.removesuffix(self._held)
        return [{"content": text}] if text else []
