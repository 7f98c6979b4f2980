"""What an answer must look like: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from pacellm.errors import RequestError
from pacellm.text import constraints
from pacellm.text.constraints import Grammar

from ..reading.tools import NAME
from ..schema import Strict

_Text = Annotated[str, Field(min_length=1, max_length=2**18)]


class JsonSchema(Strict):
    """A schema with a name."""

    name: Annotated[str, Field(pattern=NAME)]
    description: Annotated[str, Field(max_length=16_384)] | None = None  # the model is not told the form
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON that a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """None for text.

        Raises:
            RequestError: the schema is missing or not asked for.
        """
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = "response_format.json_schema goes with type json_schema"
            raise RequestError(message, param="response_format.json_schema", code="invalid_value")
        if self.json_schema is not None and self.json_schema.schema_ is not None:
            field = "response_format.json_schema.schema"
            return constraints.of_json(self.json_schema.schema_, field, is_strict=self.json_schema.strict is not False)
        return None if self.type == "text" else constraints.of_json({"type": "object"}, "response_format")


class TextFormat(Strict):
    """The same as the Responses API writes it."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(pattern=NAME)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        """None for text.

        Raises:
            RequestError: name and schema are missing or not asked for.
        """
        if self.type == "json_schema":
            for field, value in (("name", self.name), ("schema", self.schema_)):
                if value is None:
                    message = f"text.format of type json_schema needs a {field}"
                    raise RequestError(message, param=f"text.format.{field}", code="invalid_value")
            return constraints.of_json(self.schema_ or {}, "text.format.schema", is_strict=self.strict is not False)
        for field in ("name", "description", "schema_", "strict"):
            if getattr(self, field) is not None:
                name = field.rstrip("_")
                message = f"text.format.{name} goes with type json_schema"
                raise RequestError(message, param=f"text.format.{name}", code="invalid_value")
        return None if self.type == "text" else constraints.of_json({"type": "object"}, "text.format")


class StructuredOutputs(Strict):
    """One of four ways to say it."""

    json_: Annotated[dict[str, Any] | _Text | None, Field(alias="json")] = None
    regex: _Text | None = None
    choice: Annotated[list[_Text], Field(min_length=1, max_length=16_384, fail_fast=True)] | None = None
    grammar_: Annotated[_Text | None, Field(alias="grammar")] = None

    def grammar(self) -> Grammar:
        """Of the one that is given.

        Raises:
            RequestError: none or several are, or it is no JSON.
        """
        given = [one for one in (self.json_, self.regex, self.choice, self.grammar_) if one is not None]
        if len(given) != 1:
            message = "structured_outputs takes one of json, regex, choice and grammar"
            raise RequestError(message, param="structured_outputs", code="invalid_value")
        if self.json_ is not None:
            return constraints.of_json(_schema(self.json_), "structured_outputs.json")
        if self.regex is not None:
            return constraints.of_regex(self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return constraints.of_choice(self.choice, "structured_outputs.choice")
        return constraints.of_lark(self.grammar_ or "", "structured_outputs.grammar")


def _schema(given: dict[str, Any] | str) -> dict[str, Any]:
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        message = "structured_outputs.json must be a JSON schema"
        raise RequestError(message, param="structured_outputs.json", code="invalid_value")
    return found
