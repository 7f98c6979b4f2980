"""Messages and tools as a model's chat template takes them, or in plain words where it has no place for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pacellm.errors import UnsupportedParameter
from pacellm.tokenizer import ChatTokenizer
from server.schema.messages import Message
from server.schema.tools import Tool

_INTRODUCTION = (
    "These functions can be called. A call is written as a JSON list and nothing else: "
    '[{"name": "NAME", "arguments": {...}}]'
)


class Talk:
    """A conversation for the chat template, its texts shielded.

    Args:
        tokenizer: of the model.
        messages, tools: as the client sent them.
        is_open: the last message is to be gone on with.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Tool], *, is_open: bool = False
    ) -> None:
        self._tokenizer, self._dialect, self._literals = tokenizer, tokenizer.dialect, tokenizer.literals
        self._messages, self._tools, self._is_open = messages, tools, is_open
        self._names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}

    def tools(self) -> list[dict[str, Any]] | None:
        """For the template; None where it has no place for them, or there are none."""
        if not self._tools or not self._dialect.reads_tools:
            return None
        return [self._literals.shielded_value(tool.shown()) for tool in self._tools]

    def messages(self) -> list[dict[str, Any]]:
        """For the template.

        Raises:
            RequestError: arguments that are no JSON object.
            UnsupportedParameter: reasoning that this model has no place for.
        """
        found: list[dict[str, Any]] = []
        for number, message in enumerate(self._messages):
            entry = self._entry(number, message)
            if message.role == "tool":
                name = message.name or self._names[message.tool_call_id or ""]
                if self._dialect.reads_results:
                    entry |= self._literals.shielded_value({"tool_call_id": message.tool_call_id, "name": name})
                elif number and self._messages[number - 1].role == "tool":
                    found[-1]["content"] += "\n" + self._result(name, entry["content"])
                    continue
                else:
                    entry = {"role": "user", "content": self._result(name, entry["content"])}
            found.append(entry)
        return found if self._dialect.reads_tools or not self._tools else self._introduced(found)

    def _entry(self, number: int, message: Message) -> dict[str, Any]:
        entry: dict[str, Any] = {"role": message.role, "content": self._content(number, message)}
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            if self._dialect.reasoning_key is not None:
                entry[self._dialect.reasoning_key] = self._literals.shielded(reasoning, own=True)
            elif self._dialect.think is None:
                raise UnsupportedParameter("this model does not reason", param=f"messages.{number}.reasoning_content")
        calls = self._calls(number, message)
        if calls and self._dialect.reads_calls:
            ids = (self._literals.shielded(call.id) for call in message.tool_calls or ())
            entry["tool_calls"] = [
                {"id": i, "type": "function", "function": call} for i, call in zip(ids, calls, strict=True)
            ]
        elif calls:
            written = json.dumps(calls, ensure_ascii=False)
            entry["content"] = f"{entry['content']}\n{written}" if entry["content"] else written
        return entry

    def _content(self, number: int, message: Message) -> str:
        if message.role != "assistant":
            return self._literals.shielded(message.text())
        is_open = self._is_open and number == len(self._messages) - 1
        marks = self._dialect.think if is_open or self._tokenizer.splits_answers else None
        return self._literals.shielded_answer(message.text(), marks, is_open=is_open)

    def _calls(self, number: int, message: Message) -> list[dict[str, Any]]:
        field = f"messages.{number}.tool_calls"
        return [
            self._literals.shielded_value(
                {"name": call.function.name, "arguments": call.arguments(f"{field}.{place}.function.arguments")}
            )
            for place, call in enumerate(message.tool_calls or ())
        ]

    def _result(self, name: str, text: str) -> str:
        return json.dumps({"function": self._literals.shielded(name), "result": text}, ensure_ascii=False)

    def _introduced(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The tools at the end of the system message, or in one of their own."""
        shown = (self._literals.shielded_value(tool.shown()["function"]) for tool in self._tools)
        text = "\n".join([_INTRODUCTION, *(json.dumps(function, ensure_ascii=False) for function in shown)])
        if messages[0]["role"] in ("system", "developer"):
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]
