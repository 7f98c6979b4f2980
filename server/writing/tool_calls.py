"""Calls of tools out of JSON as it is written."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

MessageDelta = dict[str, Any]
_HALVES = re.compile("[\ud800-\udfff]")


def begun(index: int, name: str) -> MessageDelta:
    """The first piece of a call."""
    function = {"name": name, "arguments": ""}
    return {
        "tool_calls": [{"index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}]
    }


def continued(index: int, arguments: str) -> MessageDelta:
    """More of a call's arguments."""
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def as_json(value: Any) -> str:
    """JSON that can be sent: a half of a surrogate pair has no bytes and stays escaped; what is no number is a text."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        value = json.loads(json.dumps(value), parse_constant=str)
        written = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if _HALVES.search(written) else written


class ToolCallScanner:
    """Reads ``{"name": ..., "arguments": {...}}``, or a list of these, a piece at a time.

    Arguments are passed on as they are written, once the name is known. ``parameters`` may stand for ``arguments``,
    and they may be a string of JSON.

    Args:
        first: number of the first call.
    """

    def __init__(self, first: int = 0) -> None:
        self.num_calls = first
        self._raw = ""  # what may yet turn out to be no call
        self._base: int | None = None  # depth around calls: 1 within a list
        self._depth = 0
        self._in_string = self._is_escaped = self._in_key = self._is_new = False
        self._key = self._value = ""
        self._is_named = self._has_arguments = self._is_text = False  # of the call, of its value
        self._held = ""  # arguments that came before the name
        self._out: list[MessageDelta] = []

    def push(self, text: str) -> list[MessageDelta]:
        """What is certain by now."""
        self._raw += text
        for character in text:
            self._take(character)
        if self._is_named and self._key in ("arguments", "parameters") and not self._is_text:
            self._flush()
        out, self._out = self._out, []
        return out

    @property
    def is_inside(self) -> bool:
        """A call has begun and not ended."""
        return self._is_named

    def finish(self) -> str:
        """The text that is part of no call."""
        return self._raw

    def _take(self, character: str) -> None:
        if self._in_string:
            self._keep(character)
            ends = character == '"' and not self._is_escaped
            self._is_escaped = character == "\\" and not self._is_escaped
            self._in_string = not ends
        elif self._base is None:
            self._begin(character)
        elif character in "]}":
            self._close(character)
        elif self._depth == self._base + 1 and character in ",:":
            self._next(character)
        else:
            self._open(character)

    def _begin(self, character: str) -> None:
        """The first character tells a list from a single call; of anything else nothing is made."""
        if character == "[":
            self._base = self._depth = 1
        elif character == "{":
            self._base = 0
            self._open(character)
        elif not character.isspace():
            self._base = -9

    def _open(self, character: str) -> None:
        assert self._base is not None
        if character in "[{":
            self._depth += 1
            if self._depth == self._base + 1:
                self._in_key, self._is_named, self._has_arguments = True, False, False
                self._key = self._value = self._held = ""
                return
        self._in_string = character == '"'
        if self._depth > self._base + 1 or not character.isspace():
            self._keep(character)

    def _close(self, character: str) -> None:
        assert self._base is not None
        self._depth -= 1
        if self._depth == self._base and self._base >= 0:
            self._end_value()
            self._end_call()
        elif self._depth > self._base:
            self._keep(character)

    def _next(self, character: str) -> None:
        """A comma or colon between the call's own keys and values."""
        if character == ":" and self._in_key:
            self._in_key, self._key, self._value, self._is_text = False, _loaded(self._key), "", False
            self._is_new = True
        elif character == ",":
            self._end_value()
            self._in_key, self._key = True, ""

    def _keep(self, character: str) -> None:
        assert self._base is not None
        if self._depth <= self._base:
            return
        if self._in_key:
            self._key += character
        else:
            self._is_text |= self._is_new and character == '"'
            self._is_new = False
            self._value += character

    def _end_value(self) -> None:
        if self._key == "name" and not self._is_named:
            name = _loaded(self._value)
            if name:
                self._is_named, self._raw = True, ""
                self._out.append(begun(self.num_calls, name))
                self._pass_on(self._held)
        elif self._key in ("arguments", "parameters"):
            self._value = _loaded(self._value) if self._is_text else self._value
            if self._is_named:
                self._flush()
            else:
                self._held += self._value
        self._key = self._value = ""

    def _flush(self) -> None:
        self._pass_on(self._value)
        self._value = ""
        self._raw = ""

    def _pass_on(self, arguments: str) -> None:
        if arguments:
            self._has_arguments = True
            self._out.append(continued(self.num_calls, arguments))

    def _end_call(self) -> None:
        if self._is_named:
            if not self._has_arguments:
                self._pass_on("{}")
            self.num_calls += 1
            self._is_named, self._raw = False, ""


def _loaded(text: str) -> str:
    """A JSON string's text, "" where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return ""
    return _HALVES.sub("\ufffd", found) if isinstance(found, str) else ""
