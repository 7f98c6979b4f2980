"""How a model writes reasoning and calls of tools, as far as its tokenizer's files tell.

A tokenizer may come with a response template (transformers' ``response_template``). Where it does not, two ways are
recognised in the text of the chat template: ``<think>…</think>``, and ``<tool_call>…</tool_call>`` around a call in
JSON (Hermes, Qwen2.5, Qwen3) or in tags (``<function=NAME><parameter=KEY>``, Qwen3-Coder, Qwen3.5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the field that holds reasoning, in messages and in response templates."""
CALL, ANSWER = ("<tool_call>", "</tool_call>"), "<answer>"
"""What an answer begins with where a template has no known form for tools: a call, or text."""
_CALLS, _CALL = ("<tool_call>", "</tool_call>"), {"type": "function", "function": "{content}"}
_THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Dialect:
    """What is known of a model's way to write.

    Attributes:
        template: for transformers' response parser; None where everything is content.
        think: literal marks of reasoning.
        call: literal marks around a call that is JSON with ``name`` and ``arguments``; the parser leaves it as text.
        reads_tools, reads_calls, reads_results: the chat template shows tools, earlier calls, and messages of tools.
        reasoning_key: under which name the chat template reads earlier reasoning; None where it does not.
        has_anchor: the response template came with the tokenizer and finds by itself where an answer begins.
    """

    template: Mapping[str, Any] | None = None
    think: tuple[str, str] | None = None
    call: tuple[str, str] | None = None
    reads_tools: bool = False
    reads_calls: bool = False
    reads_results: bool = False
    reasoning_key: str | None = None
    has_anchor: bool = False

    @property
    def writes_calls(self) -> bool:
        """Calls can be found in what the model writes."""
        return self.template is not None and "tool_calls" in self.template["fields"]

    @property
    def has_tools(self) -> bool:
        """The template shows tools, calls and results, and calls can be found in what the model writes."""
        return self.reads_tools and self.reads_calls and self.reads_results and self.writes_calls

    def without_calls(self) -> Dialect:
        """The same, for answers in which a call is text like any other."""
        if not self.writes_calls or self.template is None:
            return self
        fields = {name: field for name, field in self.template["fields"].items() if name != "tool_calls"}
        has_others = any("open" in field or "open_pattern" in field for field in fields.values())
        template = {**self.template, "fields": fields} if has_others else None
        return replace(self, template=template, call=None)

    def prefix(self, prompt: str, *, continues: bool) -> str:
        """What the response parser must know of a prompt.

        Args:
            continues: the prompt ends within an answer.
        """
        if self.has_anchor:
            return prompt
        return self.think[0] if self.think and self.is_thinking(prompt, continues=continues) else ""

    def is_thinking(self, prompt: str, *, continues: bool) -> bool:
        """The prompt has begun the answer's reasoning and not ended it."""
        if self.think is None:
            return False
        begin, end = prompt.rfind(self.think[0]), prompt.rfind(self.think[1])
        is_open = begin >= 0 and begin > end
        return is_open and (continues or not prompt[begin + len(self.think[0]) :].strip())


def detect(chat_template: str, variables: frozenset[str], response_template: Mapping[str, Any] | None) -> Dialect:
    """What a tokenizer's files tell.

    Args:
        chat_template: its source; of several, all of them.
        variables: names that it reads and does not set.
        response_template: what came with the tokenizer.
    """
    facts: dict[str, Any] = {
        "reads_tools": "tools" in variables or (not variables and re.search(r"\btools\b", chat_template) is not None),
        "reads_calls": "tool_calls" in chat_template,
        "reads_results": re.search(r"""["']tool["']""", chat_template) is not None,
        "reasoning_key": next((name for name in REASONING if re.search(rf"\b{name}\b", chat_template)), None),
    }
    if response_template is not None:
        template, call = _with_text_calls(response_template)
        return Dialect(template=template, think=_think_of(response_template), call=call, has_anchor=True, **facts)
    fields: dict[str, Any] = {}
    think = _THINK if _has_marks(chat_template, _THINK) else None
    if think is not None:
        fields["reasoning_content"] = _region(think, {"content": "text"})
    calls, call = _calls_of(chat_template)
    if calls is not None:
        fields["tool_calls"] = calls
    if not fields:
        return Dialect(**facts)
    fields["content"] = {"content": "text"}
    return Dialect(template={"start_anchor_pattern": r"\A", "fields": fields}, think=think, call=call, **facts)


def _has_marks(chat_template: str, marks: tuple[str, str]) -> bool:
    return all(mark in chat_template for mark in marks)


def _calls_of(chat_template: str) -> tuple[dict[str, Any] | None, tuple[str, str] | None]:
    """The field of calls, and the marks around calls that are JSON."""
    if not _has_marks(chat_template, _CALLS):
        return None, None
    if "<function=" in chat_template and "<parameter=" in chat_template:
        return _TAGGED_CALLS, None
    if "arguments" in chat_template:
        return _call_region(_CALLS), _CALLS
    return None, None


# what is between the marks of Qwen3-Coder and Qwen3.5: a value has a line of its own, and ends where another begins or
# none is left
_PARAMETER = r"<parameter=(?P<key>[^<>\n]+)>\n?(?P<value>.*?)\n?</parameter>(?=\s*(?:<parameter=[^<>\n]+>|\Z))"
_TAGGED_CALLS = {
    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
    "close_pattern": r"</function>\s*</tool_call>\s*",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {"tag_pattern": _PARAMETER},
    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
}


def _region(marks: tuple[str, str], field: dict[str, Any]) -> dict[str, Any]:
    """A field between literal marks; white space around them is nobody's."""
    begin, end = (re.escape(mark) for mark in marks)
    return {"open_pattern": rf"\s*{begin}\s*", "close_pattern": rf"\s*{end}\s*", **field}


def _call_region(marks: tuple[str, str]) -> dict[str, Any]:
    """A call whose text is left as it is."""
    begin, end = (re.escape(mark) for mark in marks)
    return {"open_pattern": rf"\s*{begin}", "close_pattern": rf"{end}\s*", "content": "text", "repeats": True}


def _literals(field: Any) -> tuple[str, str] | None:
    begin, end = field.get("open"), field.get("close")
    return (begin, end) if isinstance(begin, str) and isinstance(end, str) else None


def _think_of(template: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((_literals(template["fields"][name]) for name in REASONING if name in template["fields"]), None)


def _with_text_calls(template: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, str] | None]:
    """A response template whose calls are JSON between literal marks, with those left as text: so they can be passed on
    as they come."""
    field = template["fields"].get("tool_calls", {})
    plain = field.get("content") == "json" and not field.get("content_args") and field.get("transform") == _CALL
    marks = _literals(field) or _literals({**field, "open": _plain_mark(field.get("open_pattern"))})
    if not plain or marks is None:
        return template, None
    return {**template, "fields": {**template["fields"], "tool_calls": _call_region(marks)}}, marks


def _plain_mark(pattern: Any) -> str | None:
    r"""The literal of a pattern that is one behind ``\s*``."""
    found = re.fullmatch(r"(?:\\s\*)?([\w<>/]+)", pattern) if isinstance(pattern, str) else None
    return found[1] if found else None
