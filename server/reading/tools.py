"""Tools, and the messages that carry calls and results, as chat completions have them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from pacellm.errors import RequestError

from ..json_shape import MAX_DEPTH, shape_of
from ..schema import Strict

MAX_TOOLS = 128
MAX_CALLS = 4096  # in one message; an answer may have that many where nothing constrains it
MAX_ARGUMENTS = 2**18  # values in the arguments of all calls of a request, commas in their texts included
NAME = r"^[A-Za-z0-9_-]{1,64}$"
_Name = Annotated[str, Field(pattern=NAME)]


class FunctionDefinition(Strict):
    """What a function is called and takes."""

    name: _Name
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition

    def shown(self) -> dict[str, Any]:
        """For the chat template."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionName(Strict):
    """One function."""

    name: _Name


class NamedTool(Strict):
    """The function to call."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Strict):
    """A function and what it was called with: JSON, unless the model erred or was cut. What a client has read out of
    that is its own."""

    model_config = ConfigDict(extra="ignore")

    name: str
    arguments: Annotated[str, Field(max_length=2**24)] = ""

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Some clients send what they have read."""
        if value is None or isinstance(value, str):
            return value or ""
        return json.dumps(value, ensure_ascii=False)

    def read(self) -> dict[str, Any] | None:
        """The arguments as an object; None where they are no JSON object, or one that a template could not write."""
        text = self.arguments.strip()
        if not text:
            return {}
        try:
            found = None if _depth(text) > MAX_DEPTH else json.loads(text)
            if "\\ud" in text.lower():
                json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair has no bytes
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


class ToolCall(Strict):
    """A call that an earlier answer made; of a stream's it may have the index."""

    model_config = ConfigDict(extra="ignore")

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


def check_arguments(calls: Iterable[ToolCall]) -> None:
    """Refuse calls whose arguments are JSON that takes long to read. They are texts, so no limit of the body is theirs.

    Raises:
        RequestError: too many values in all.
    """
    texts = (call.function.arguments for call in calls)
    if sum(text.count("[") + text.count("{") + text.count(",") for text in texts) > MAX_ARGUMENTS:
        message = f"the arguments of all calls have more than {MAX_ARGUMENTS:,} values"
        raise RequestError(message, param="messages", code="body_too_complex")


def _depth(text: str) -> int:
    """How deep a text of JSON is nested, at most."""
    containers = text.count("[") + text.count("{")
    return containers if containers <= MAX_DEPTH else shape_of(text.encode("utf-8", "surrogatepass")).depth


def check_tools(tools: list[Tool], choice: ToolChoice | None, inner: str = ".function") -> None:
    """Refuse tools that contradict each other or their choice.

    Args:
        inner: where in a tool, and in a choice, its fields are.

    Raises:
        RequestError: names the field.
    """
    names: set[str] = set()
    for number, tool in enumerate(tools):
        field, function = f"tools.{number}{inner}", tool.function
        if function.name in names:
            raise RequestError(f"two tools are named {function.name!r}", param=f"{field}.name", code="invalid_value")
        names.add(function.name)
        if function.parameters is not None and function.parameters.get("type") != "object":
            message = f'{field}.parameters must be a JSON schema with "type": "object"'
            raise RequestError(message, param=f"{field}.parameters", code="invalid_value")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        message = f"tool_choice names {choice.function.name!r}, which is not among the tools"
        raise RequestError(message, param=f"tool_choice{inner}.name", code="invalid_value")
    if choice == "required" and not tools:
        raise RequestError("tool_choice required needs tools", param="tool_choice", code="invalid_value")
