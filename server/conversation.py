"""Messages and tools as a model's chat template takes them, or in plain words where it has no place for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pacellm.dialect import Dialect
from pacellm.errors import UnsupportedParameter
from server.schema.messages import Message
from server.schema.tools import Tool

_INTRODUCTION = (
    "These functions can be called. A call is written as a JSON list and nothing else: "
    '[{"name": "NAME", "arguments": {...}}]'
)


def for_template(messages: Sequence[Message], tools: Sequence[Tool], dialect: Dialect) -> list[dict[str, Any]]:
    """A conversation for the chat template.

    Raises:
        RequestError: arguments that are no JSON object.
        UnsupportedParameter: reasoning that this model has no place for.
    """
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        entry = _entry(message, f"messages.{number}", dialect)
        if message.role == "tool":
            name = message.name or names[message.tool_call_id or ""]
            if dialect.reads_results:
                entry |= {"tool_call_id": message.tool_call_id, "name": name}
            elif number and messages[number - 1].role == "tool":
                found[-1]["content"] += "\n" + _result(name, message)
                continue
            else:
                entry = {"role": "user", "content": _result(name, message)}
        found.append(entry)
    return found if dialect.reads_tools or not tools else _introduced(found, tools)


def _entry(message: Message, field: str, dialect: Dialect) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.text()}
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        if dialect.reasoning_key is not None:
            entry[dialect.reasoning_key] = reasoning
        elif dialect.think is None:
            raise UnsupportedParameter("this model does not reason", param=f"{field}.reasoning_content")
    calls = [
        {"name": call.function.name, "arguments": call.arguments(f"{field}.tool_calls.{number}.function.arguments")}
        for number, call in enumerate(message.tool_calls or ())
    ]
    if calls and dialect.reads_calls:
        ids = (call.id for call in message.tool_calls or ())
        entry["tool_calls"] = [
            {"id": i, "type": "function", "function": call} for i, call in zip(ids, calls, strict=True)
        ]
    elif calls:
        written = json.dumps(calls, ensure_ascii=False)
        entry["content"] = f"{entry['content']}\n{written}" if entry["content"] else written
    return entry


def _result(name: str, message: Message) -> str:
    return json.dumps({"function": name, "result": message.text()}, ensure_ascii=False)


def _introduced(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools at the end of the system message, or in one of their own."""
    lines = [json.dumps(tool.shown()["function"], ensure_ascii=False) for tool in tools]
    text = "\n".join([_INTRODUCTION, *lines])
    if messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
