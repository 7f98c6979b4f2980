"""Messages of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pacellm.errors import RequestError

from ..schema import Strict
from .tools import MAX_CALLS, ToolCall, check_arguments


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str
    # without effect on the result by its nature
    cache_control: Any = None


class Message(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=4096, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # an answer that is sent back as it came has these, empty
    audio: None = None
    function_call: None = None

    @model_validator(mode="before")
    @classmethod
    def _own(cls, data: Any) -> Any:
        """An answer that is sent back may have what its client or another server noted on it: no part of the prompt."""
        if not isinstance(data, dict) or data.get("role") != "assistant":
            return data
        found = {name: value for name, value in data.items() if name in cls.model_fields}
        for name in ("reasoning_content", "reasoning"):  # another server's, encrypted or in parts
            if not isinstance(found.get(name), str):
                found.pop(name, None)
        if isinstance(found.get("content"), list):
            found["content"] = said_parts(found["content"])
        return found

    def text(self) -> str:
        """The content as one string; a refusal is one too."""
        if self.content is None or isinstance(self.content, str):
            return self.content or self.refusal or ""
        return "".join(part.text for part in self.content)

    def num_characters(self) -> int:
        """Characters of the content and of what else a template may show."""
        parts = self.content if isinstance(self.content, list) else ()
        shown = (
            self.content if isinstance(self.content, str) else self.refusal,
            self.reasoning_content,
            self.reasoning,
        )
        calls = sum(len(call.function.arguments) for call in self.tool_calls or ())
        return sum(len(part.text) for part in parts) + sum(len(text or "") for text in shown) + calls

    def check(self, field: str) -> None:
        """Refuse what does not go with the role.

        Raises:
            RequestError: names the field, which begins with ``field``.
        """
        own = {"tool_calls": "assistant", "reasoning_content": "assistant", "reasoning": "assistant",
               "refusal": "assistant", "tool_call_id": "tool"}  # fmt: skip
        for name, role in own.items():
            if getattr(self, name) is not None and self.role != role:
                message = f"{field}.{name} goes with the role {role}"
                raise RequestError(message, param=f"{field}.{name}", code="invalid_value")
        if self.content is None and self.role != "assistant":
            raise RequestError(f"{field}.content is missing", param=f"{field}.content", code="invalid_value")
        if self.role == "tool" and self.tool_call_id is None:
            message = f"{field}.tool_call_id is missing: which call this is the result of"
            raise RequestError(message, param=f"{field}.tool_call_id", code="invalid_value")


def said_parts(parts: list[Any]) -> list[Any]:
    """What an answer's parts say: text and refusals. Others (reasoning, calls) are another server's notes."""
    keys = {"text": "text", "output_text": "text", "refusal": "refusal"}
    said = [part for part in parts if not isinstance(part, dict) or part.get("type") in keys]
    return [{"type": "text", "text": part.get(keys[part["type"]])} if isinstance(part, dict) else part for part in said]


def check_messages(messages: Sequence[Message], *, appends: bool = False) -> None:
    """Refuse a conversation that does not fit together.

    Args:
        appends: calls may lie in a session's history, which has no ids and no names: results say their function's.

    Raises:
        RequestError: names the message and its field.
    """
    check_arguments(call for message in messages for call in message.tool_calls or ())
    called: set[str] = set()
    for number, message in enumerate(messages):
        message.check(f"messages.{number}")
        called |= {call.id for call in message.tool_calls or ()}
        if message.tool_call_id is not None and message.tool_call_id not in called:
            _check_result(message, f"messages.{number}", appends=appends)


def _check_result(message: Message, field: str, *, appends: bool) -> None:
    """Refuse a result of a call that is in no earlier message."""
    if not appends:
        field = f"{field}.tool_call_id"
        raise RequestError(f"{field} is of no call in an earlier message", param=field, code="invalid_value")
    if message.name is None:
        field = f"{field}.name"
        problem = f"{field} is missing: with pacellm.append a result says which function it is of"
        raise RequestError(problem, param=field, code="invalid_value")
