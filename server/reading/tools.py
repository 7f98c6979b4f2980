"""Tools, and the messages that carry calls and results, as chat completions have them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from pacellm.errors import RequestError

from ..json_shape import MAX_DEPTH, shape_of
from ..schema import Strict

MAX_TOOLS = 128
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
    """A function and the JSON it was called with; what a client has read out of that is its own."""

    model_config = ConfigDict(extra="ignore")

    name: _Name
    arguments: Annotated[str, Field(max_length=2**24)]


class ToolCall(Strict):
    """A call that an earlier answer made; of a stream's it may have the index."""

    model_config = ConfigDict(extra="ignore")

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction

    def arguments(self, param: str) -> dict[str, Any]:
        """The arguments as an object.

        Raises:
            RequestError: they are no JSON object.
        """
        try:
            found = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RequestError(f"{param} must be a JSON object", param=param, code="invalid_value")
        return found


def check_arguments(calls: Iterable[ToolCall]) -> None:
    """Refuse calls whose arguments are JSON that takes long to read. They are texts, so no limit of the body is theirs.

    Raises:
        RequestError: too many values in all, or nested too deep.
    """
    values = 0
    for call in calls:
        text = call.function.arguments
        containers = text.count("[") + text.count("{")
        values += containers + text.count(",")
        if values > MAX_ARGUMENTS:
            message = f"the arguments of all calls have more than {MAX_ARGUMENTS:,} values"
            raise RequestError(message, param="messages", code="body_too_complex")
        if containers > MAX_DEPTH and shape_of(text.encode("utf-8", "surrogatepass")).depth > MAX_DEPTH:
            message = f"the arguments of a call are nested deeper than {MAX_DEPTH} levels"
            raise RequestError(message, param="messages", code="body_too_complex")


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
