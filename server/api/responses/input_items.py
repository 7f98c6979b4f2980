"""Input items of the Responses API, and the messages that they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, field_validator

from pacellm.errors import NotFound

from ...reading.messages import said_parts
from ...reading.tools import NAME, FunctionDefinition, FunctionName, NamedTool, Tool
from ...schema import Strict

_Id = Annotated[str, Field(max_length=512)]
_CallId = Annotated[str, Field(min_length=1, max_length=256)]
_Status = Literal["in_progress", "completed", "incomplete"]


class Ignoring(Strict):
    """An answer's item may be sent back with what its client or another server noted on it: no part of the prompt."""

    model_config = ConfigDict(extra="ignore")


class InputPart(Strict):
    """A part of a message, or of a call's result."""

    type: Literal["input_text"]
    text: str
    # without effect on the result by its nature
    prompt_cache_breakpoint: Any = None


class InputMessage(Strict):
    """What is said to the model."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user"]
    content: str | Annotated[list[InputPart], Field(min_length=1, max_length=4096, fail_fast=True)]
    # without effect on the result by their nature
    id: _Id | None = None
    status: _Status | None = None

    def text(self) -> str:
        """The content as one string."""
        return _text(self.content)


class AnswerPart(Ignoring):
    """A part of an answer."""

    type: Literal["text"]
    text: str


class AnswerMessage(Ignoring):
    """What an earlier answer said."""

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: str | Annotated[list[AnswerPart], Field(max_length=4096, fail_fast=True)]

    @field_validator("content", mode="before")
    @classmethod
    def _said(cls, content: Any) -> Any:
        return said_parts(content) if isinstance(content, list) else content

    def text(self) -> str:
        """The content as one string."""
        return _text(self.content)


class CallItem(Ignoring):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: _CallId
    name: str
    arguments: Annotated[str, Field(max_length=2**24)] = ""

    def shown(self) -> dict[str, Any]:
        """As a message has it."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: _CallId
    output: str | Annotated[list[InputPart], Field(max_length=4096, fail_fast=True)]
    # without effect on the result by their nature
    id: _Id | None = None
    status: _Status | None = None
    name: str | None = None
    # a result that is dumped as it came has these, empty
    namespace: None = None
    caller: None = None

    def text(self) -> str:
        """The result as one string."""
        return _text(self.output)


class ReasoningText(Ignoring):
    """A part of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Ignoring):
    """What an earlier answer thought before it spoke. Of another server's there is a summary, or what only it can read:
    neither is part of the prompt."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(max_length=4096, fail_fast=True)] | None = None


class ItemReference(Strict):
    """An item of a response that is stored here, by its id."""

    type: Literal["item_reference"] | None = None
    id: _Id


_KINDS = {
    "message": "M", "function_call": "C", "function_call_output": "O", "reasoning": "R", "item_reference": "I",
}  # fmt: skip


def _kind(item: Any) -> str | None:
    """Upper-case tags, which error locations leave out; a message need not say its type, nor a reference."""
    if not isinstance(item, dict):
        return None
    name = item.get("type") or ("item_reference" if "id" in item and "role" not in item else "message")
    if name == "message" and item.get("role") == "assistant":
        return "A"
    return _KINDS.get(name) if isinstance(name, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("M")]
    | Annotated[AnswerMessage, Tag("A")]
    | Annotated[CallItem, Tag("C")]
    | Annotated[CallOutputItem, Tag("O")]
    | Annotated[ReasoningItem, Tag("R")]
    | Annotated[ItemReference, Tag("I")],
    Discriminator(
        _kind, custom_error_type="item_type", custom_error_message=f"an item's type is one of {', '.join(_KINDS)}"
    ),
]
_ITEM: TypeAdapter[Any] = TypeAdapter(InputItem)


def resolved(items: Iterable[Any], item: Callable[[str], dict[str, Any] | None]) -> Iterator[Any]:
    """Items with those in place of references that they are to.

    Args:
        item: finds an item of a stored response by its id.

    Raises:
        NotFound: it is not kept.
    """
    for number, one in enumerate(items):
        if not isinstance(one, ItemReference):
            yield one
            continue
        found = item(one.id)
        if found is None:
            raise NotFound(f"there is no item {one.id!r} of a stored response, or it is no longer kept",
                           param=f"input.{number}.id", code="item_not_found")  # fmt: skip
        yield _ITEM.validate_python(found)


def _text(content: str | list[InputPart] | list[AnswerPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def messages_of(items: Iterable[Any]) -> list[dict[str, Any]]:
    """Chat messages: reasoning, text and calls of one answer are one message."""
    found: list[dict[str, Any]] = []
    for item in items:
        last = found[-1] if found and found[-1]["role"] == "assistant" else None
        match item:
            case CallItem() if last is not None:
                last.setdefault("tool_calls", []).append(item.shown())
            case AnswerMessage() if last is not None and _is_bare(last):
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
