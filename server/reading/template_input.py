"""Messages and tools as a model's chat template takes them, or in plain words where it has no place for them."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Sequence
from typing import Any

from pacellm.text.tokenizer import ChatTokenizer

from .generic_tools import GenericTools, fitted, results_text, with_system
from .messages import Message
from .tools import Tool, ToolCall

_STAND_IN = f"arguments-{secrets.token_hex(8)}"  # no text has it


class TemplateInput:
    """A conversation for the chat template, its texts shielded.

    A call's arguments that are no object have a stand-in that is one, as templates take nothing else.

    Args:
        tokenizer: of the model.
        messages, tools: as the client sent them.
        is_open: the last message is to be gone on with.
        is_behind: messages before these have told the model of the tools.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        *,
        is_open: bool = False,
        is_behind: bool = False,
    ) -> None:
        self._tokenizer, self._dialect, self._literals = tokenizer, tokenizer.dialect, tokenizer.literals
        self._messages, self._tools, self._is_open, self._is_behind = messages, tools, is_open, is_behind
        self._names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
        has_calls = bool(self._names) or any(message.role == "tool" for message in messages)
        self._stand_ins: list[str] = []
        self._form = None if self._dialect.has_tools or not (tools or has_calls) else GenericTools(tokenizer.literals)

    def tools(self) -> list[dict[str, Any]] | None:
        """For the template; None where they are among the messages, or there are none."""
        if not self._tools or self._form is not None:
            return None
        return [self._literals.shielded_value(tool.shown()) for tool in self._tools]

    def messages(self) -> list[dict[str, Any]]:
        """For the template."""
        entries = [self._entry(number, message) for number, message in enumerate(self._messages)]
        return entries if self._form is None else self._in_words(entries, self._form)

    def _entry(self, number: int, message: Message) -> dict[str, Any]:
        entry: dict[str, Any] = {"role": message.role, "content": self._content(number, message)}
        reasoning = message.reasoning_content or message.reasoning
        if reasoning and self._dialect.reasoning_key is not None:
            entry[self._dialect.reasoning_key] = self._literals.shielded(reasoning, own=True)
        if message.tool_calls:
            entry["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.role == "tool":
            name = message.name or self._names[message.tool_call_id or ""]
            entry |= self._literals.shielded_value({"tool_call_id": message.tool_call_id, "name": name})
        return entry

    def restored(self, rendered: str) -> str:
        """A rendered conversation with the texts that have stand-ins: where an object stood, or a value."""
        if not self._stand_ins:
            return rendered
        name = rf"{_STAND_IN}-(\d+)"
        rendered = re.sub(rf'\{{\s*"{_STAND_IN}"\s*:\s*"{name}"\s*\}}', self._stood_for, rendered)
        return re.sub(name, self._stood_for, rendered).replace(_STAND_IN, "arguments")

    def _stood_for(self, found: re.Match[str]) -> str:
        return self._stand_ins[int(found[1])]

    def _in_words(self, entries: list[dict[str, Any]], form: GenericTools) -> list[dict[str, Any]]:
        """Tools, calls and results in plain words, and roles as the template takes them."""
        found: list[dict[str, Any]] = []
        for is_results, run in itertools.groupby(entries, key=lambda entry: entry["role"] == "tool"):
            if is_results:
                text = results_text([(entry["name"], entry["content"]) for entry in run])
                found.append({"role": "user", "content": text})
                continue
            found += [self._said_in_words(entry, form) for entry in run]
        if self._tools and not self._is_behind:
            shown = [self._literals.shielded_value(tool.shown()["function"]) for tool in self._tools]
            found = with_system(found, form.introduction(shown))
        takes_system = self._is_behind or self._tokenizer.takes_system  # behind others the template decides
        return fitted(found, takes_system=takes_system, takes_runs=self._tokenizer.takes_runs)

    def _said_in_words(self, entry: dict[str, Any], form: GenericTools) -> dict[str, Any]:
        calls = [call["function"] for call in entry.pop("tool_calls", ())]
        if entry["role"] == "assistant" and (calls or self._tools):  # without tools an answer is text alone
            entry["content"] = form.answer(entry["content"], calls)
        return entry

    def _content(self, number: int, message: Message) -> str:
        if message.role != "assistant":
            return self._literals.shielded(message.text())
        is_open = self._is_open and number == len(self._messages) - 1
        marks = self._dialect.think if is_open or self._tokenizer.splits_answers else None
        return self._literals.shielded_answer(message.text(), marks, is_open=is_open)

    def _call(self, call: ToolCall) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self._literals.shielded(call.function.name)}
        arguments = call.function.read()
        if arguments is None:
            self._stand_ins.append(self._literals.shielded(call.function.arguments))
            function["arguments"] = {_STAND_IN: f"{_STAND_IN}-{len(self._stand_ins) - 1}"}
        else:
            function["arguments"] = self._literals.shielded_value(arguments)
        return {"id": self._literals.shielded(call.id), "type": "function", "function": function}
