"""transformers' response parser, for which a call ends where its arguments do: an end mark within a text is text."""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers.utils.chat_parsing.response_parser import ResponseParser, _schema_types

_QUOTES = {"text": '"', "json": '"', "python-call-list": "\"'"}  # around texts, by how a region is written
_PARAMETER = ("<parameter=", "</parameter>")
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,999})")


class CallParser(ResponseParser):
    """Reads an answer a piece at a time. A call's last event has its text as it was written (``raw``), and no value
    where it could not be read.

    Attributes:
        is_cut: the answer ended within a call.
    """

    is_cut = False
    _quoted: Quoted | None = None
    _opening = _closing = ""

    def finish(self) -> list[dict[str, Any]]:
        """The last events: no more text comes."""
        events: list[dict[str, Any]] = []
        self._process(events, eos=True)
        return events

    def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:
        super()._open_explicit(events, field, m)
        self._opening, self._closing = m.group(), ""
        quotes = None if field.content_args.get("string_delims") else _QUOTES.get(field.content)
        self._quoted = Quoted(quotes) if quotes is not None and field.name == "tool_calls" else None

    def _accumulate(self, events: list[dict[str, Any]], text: str) -> None:
        super()._accumulate(events, text)
        if self._quoted is not None:
            self._quoted.take(text)

    def _scan(self, watch: list[Any], eos: bool) -> tuple[Any, int]:
        """As transformers', but an end mark within a text is passed over."""
        if self._current != "tool_calls":
            return super()._scan(watch, eos)
        begin, quoted, num_read = self._pos, copy.copy(self._quoted), self._pos
        found, held = super()._scan(watch, eos)
        while found is not None:
            mark = found[2]
            if quoted is not None:
                quoted.take(self._buffer[num_read : mark.start()])
                num_read = mark.start()
            if not (quoted.is_open if quoted is not None else self._is_value(found[1], begin, mark.start())):
                self._closing = mark.group()
                break
            self._pos = max(mark.end(), mark.start() + 1)
            found, held = super()._scan(watch, eos)
        self._pos = begin
        self.is_cut = eos and found is None
        return found, held

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        if self._current != "tool_calls":
            super()._close_current(events)
            return
        raw = self._opening + self._body + self._closing
        if self.is_cut and _is_tagged(self._spec.fields[self._current]):
            self._body = self._body[: self._body.rfind(_PARAMETER[1]) + len(_PARAMETER[1])]
        try:
            super()._close_current(events)
            events[-1]["raw"] = raw
        except (ValueError, KeyError, TypeError):  # no call after all, whatever its marks say
            events.append({"type": "region_close", "field": self._current, "value": None, "raw": raw})
            self._reset_to_implicit()

    def _coerce_tool_calls(self, value: Any) -> Any:
        """As transformers', but a whole number is not rounded to a double's 53 bits."""
        function = value.get("function") if isinstance(value, dict) else None
        if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), dict):
            declared = self._tool_params.get(str(function.get("name")), {})
            for key, text in arguments.items():
                types = _schema_types(declared.get(key))
                is_number = ("number" in types or "integer" in types) and "boolean" not in types  # 1 may be true
                if is_number and isinstance(text, str) and _WHOLE.fullmatch(text.strip()):
                    arguments[key] = int(text)
        return super()._coerce_tool_calls(value)

    def _is_value(self, field: Any, begin: int, end: int) -> bool:
        """Whether a call in tags is within a parameter's value where an end mark begins."""
        if not _is_tagged(field):
            return False
        body = self._body + self._buffer[begin:end]
        return _PARAMETER[0] in body and not body.rstrip().endswith(_PARAMETER[1])


class Quoted:
    """Follows a list or an object, and tells whether a text in it is open.

    Args:
        quotes: what texts begin and end with.
    """

    def __init__(self, quotes: str) -> None:
        self._quotes, self._quote = quotes, ""
        self._is_escaped = self._has_begun = False

    @property
    def is_open(self) -> bool:
        """What comes next is within a text."""
        return self._quote != ""

    def take(self, text: str) -> None:
        """More of it."""
        for character in text:
            if self._quote:
                self._take_quoted(character)
            elif character in self._quotes and self._has_begun:
                self._quote = character
            elif not self._has_begun and not character.isspace():
                self._has_begun = True
                self._quotes = self._quotes if character in "[{" else ""

    def _take_quoted(self, character: str) -> None:
        if character in "\n\r":  # no text has one: this is not what it should be, and its end mark is one
            self._quotes = self._quote = ""
        elif self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == self._quote:
            self._quote = ""


def _is_tagged(field: Any) -> bool:
    """A call is written as ``<parameter=KEY>`` and values."""
    return field.content == "xml-inline" and _PARAMETER[0] in field.content_args["tag_pattern"]
