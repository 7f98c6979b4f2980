"""Input items of the Responses API, and the messages that they come to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag

from ...reading.tools import NAME, FunctionDefinition, FunctionName, NamedTool, Tool
from ...schema import Strict

_Id = Annotated[str, Field(max_length=512)]
_CallId = Annotated[str, Field(min_length=1, max_length=256)]
_Status = Literal["in_progress", "completed", "incomplete"]


class InputPart(Strict):
    """A part of a message; an answer's part may be sent back as it came."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Strict):
    """A message; an answer's output item may be sent back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(min_length=1, max_length=4096, fail_fast=True)]
    # without effect on the result by their nature
    id: _Id | None = None
    status: _Status | None = None
    # the model would not be told of it
    phase: None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CallItem(Strict):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: _CallId
    name: Annotated[str, Field(pattern=NAME)]
    arguments: Annotated[str, Field(max_length=2**24)]
    id: _Id | None = None
    status: _Status | None = None
    # an answer that is dumped as it came has these, empty
    namespace: None = None
    caller: None = None
    async_: Annotated[None, Field(validation_alias=AliasChoices("async", "async_"))] = None

    def shown(self) -> dict[str, Any]:
        """As a message has it."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class OutputText(Strict):
    """A part of a call's result."""

    type: Literal["input_text"]
    text: str


class CallOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: _CallId
    output: str | Annotated[list[OutputText], Field(max_length=4096, fail_fast=True)]
    id: _Id | None = None
    status: _Status | None = None

    def text(self) -> str:
        """The result as one string."""
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class ReasoningText(Strict):
    """A part of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """What an earlier answer thought before it spoke."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(max_length=4096, fail_fast=True)] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    encrypted_content: None = None
    id: _Id | None = None
    status: _Status | None = None


_KINDS = {"message": "M", "function_call": "C", "function_call_output": "O", "reasoning": "R"}


def _kind(item: Any) -> str | None:
    """Upper-case tags, which error locations leave out; a message need not say its type."""
    name = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return _KINDS.get(name) if isinstance(name, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("M")]
    | Annotated[CallItem, Tag("C")]
    | Annotated[CallOutputItem, Tag("O")]
    | Annotated[ReasoningItem, Tag("R")],
    Discriminator(
        _kind, custom_error_type="item_type", custom_error_message=f"an item's type is one of {', '.join(_KINDS)}"
    ),
]


def messages_of(items: Iterable[Any]) -> list[dict[str, Any]]:
    """Chat messages: reasoning, text and calls of one answer are one message."""
    found: list[dict[str, Any]] = []
    for item in items:
        last = found[-1] if found and found[-1]["role"] == "assistant" else None
        match item:
            case CallItem() if last is not None:
                last.setdefault("tool_calls", []).append(item.shown())
            case InputMessage() if item.role == "assistant" and last is not None and _is_bare(last):
                last["content"] = item.text()
            case _:
                found += _new_message(item)
    return found


def _new_message(item: Any) -> list[dict[str, Any]]:
    """The message that an item begins; none where it says nothing."""
    match item:
        case ReasoningItem():
            text = "".join(part.text for part in item.content or ())
            return [{"role": "assistant", "content": "", "reasoning_content": text}] if text else []
        case CallItem():
            return [{"role": "assistant", "content": "", "tool_calls": [item.shown()]}]
        case CallOutputItem():
            return [{"role": "tool", "content": item.text(), "tool_call_id": item.call_id}]
    return [{"role": item.role, "content": item.text()}]


def _is_bare(message: dict[str, Any]) -> bool:
    """Reasoning that has not come to anything yet."""
    return not message["content"] and "reasoning_content" in message and "tool_calls" not in message


class ResponseTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """As chat has it."""
        function = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return Tool(type="function", function=function)


class ResponseNamedTool(Strict):
    """The function to call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]

    def named(self) -> NamedTool:
        """As chat has it."""
        return NamedTool(type="function", function=FunctionName(name=self.name))
