"""What bodies must keep to beside the types of their fields, as far as a schema can say it: what goes with which role,
which fields go together, and the limits of the model that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...schema import RESPONSE_PREFIX, SESSION_ID
from ...service import Service

Schema = dict[str, Any]
_NULL: Schema = {"type": "null"}
WRITABLE = f"^(?!{RESPONSE_PREFIX}){SESSION_ID[1:]}"
"""Sessions that a client may change: a stored response stays as it was."""
_SHARED = ("content", "name")
_EMPTY = ("audio", "function_call")  # null, in whatever message
_THOUGHTS = {"reasoning_content", "reasoning"}  # another server's, in whatever form, is left out
# fields of a message beside those of all, by role
_ROLES = {
    "system": (),
    "developer": (),
    "user": (),
    "assistant": ("refusal", "tool_calls", "reasoning_content", "reasoning"),
    "tool": ("tool_call_id",),
}


@dataclass(frozen=True)
class Limits:
    """What the server that is described sets to bodies.

    Attributes:
        model: its name.
        context: tokens.
        seats: sequences at once.
        vocabulary: token ids.
        variables: of the chat template, that a client may set.
    """

    model: str
    context: int
    seats: int
    vocabulary: int
    variables: tuple[str, ...]

    @classmethod
    def of(cls, service: Service) -> Limits:
        """Those of a server."""
        engine = service.engine
        return cls(
            service.settings.model_name, engine.config.max_model_len or 0, engine.config.max_num_seqs,
            engine.model.vocab_size, tuple(sorted(service.tokenizer.settable_variables)),
        )  # fmt: skip


def narrow(schemas: dict[str, Schema], limits: Limits) -> None:
    """Have schemas say what the server refuses.

    Args:
        schemas: of bodies and of their parts, by name; changed, and those of messages by role are added.
    """
    for schema in schemas.values():
        _limit(schema.get("properties", {}), limits)
    for name, rule in _RULES.items():
        if name in schemas:
            schemas[name] |= rule(schemas[name])
    if "Message" in schemas:
        schemas |= _messages(schemas["Message"])


def _limit(properties: dict[str, Schema], limits: Limits) -> None:
    """Bounds that are the model's. A body's fields have one meaning in all of them."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        _bound(properties.get(name), maximum=limits.context)
    _bound(properties.get("n"), maximum=min(limits.seats, 128))
    for name in ("tokens", "stop_token_ids", "prompt"):
        _bound(properties.get(name), exclusiveMaximum=limits.vocabulary)
    if "model" in properties:
        properties["model"] = {"enum": [limits.model, None], "default": None}
    for name in ("session_id", "conversation"):
        if name in properties:
            _first(properties[name])["pattern"] = WRITABLE
    if "chat_template_kwargs" in properties:
        names = {"propertyNames": {"enum": list(limits.variables)}} if limits.variables else {"maxProperties": 0}
        _first(properties["chat_template_kwargs"]).update(names)
    if "logit_bias" in properties:
        _first(properties["logit_bias"])["additionalProperties"] = False


def _bound(schema: Schema | None, **bounds: int) -> None:
    """Bound all integers within a schema."""
    if schema is None:
        return
    if schema.get("type") == "integer":
        schema.update(bounds)
    for inner in (*schema.get("anyOf", ()), schema.get("items")):
        _bound(inner, **bounds)


def _first(schema: Schema) -> Schema:
    """Of a field that may be null, what it is where it is not."""
    return next(one for one in schema["anyOf"] if one != _NULL)


def _without_null(schema: Schema) -> Schema:
    kinds = [one for one in schema.get("anyOf", [schema]) if one != _NULL]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _messages(schema: Schema) -> dict[str, Schema]:
    """A schema for each role, and one of all."""
    found: dict[str, Schema] = {}
    for role, own in _ROLES.items():
        is_answer = role == "assistant"
        properties = {name: schema["properties"][name] for name in (*_SHARED, *own)}
        properties = _noted(properties) if is_answer else _required(properties)
        found[f"{role.title()}Message"] = {
            "type": "object",
            "properties": {
                "role": {"const": role},
                **properties,
                **dict.fromkeys(set(schema["properties"]) - set(properties) - {"role"}, _NULL),
                **{name: schema["properties"][name] for name in _EMPTY},
            },
            "required": ["role"] if is_answer else ["role", "content", *own],
            "additionalProperties": is_answer,  # what a client noted on an answer
        }
    refs = {role: f"#/components/schemas/{role.title()}Message" for role in _ROLES}
    found["Message"] = {
        "oneOf": [{"$ref": ref} for ref in refs.values()],
        "discriminator": {"propertyName": "role", "mapping": refs},
    }
    return found


def _noted(properties: dict[str, Schema]) -> dict[str, Schema]:
    """An answer's: what somebody thought is of any kind."""
    return {name: {} if name in _THOUGHTS else field for name, field in properties.items()}


def _required(properties: dict[str, Schema]) -> dict[str, Schema]:
    """Those of other messages: all but the name must be there."""
    return {name: field if name == "name" else _without_null(field) for name, field in properties.items()}


def _one_of(schema: Schema, names: Iterable[str]) -> Schema:
    """One of these fields, and the others not."""
    properties = schema["properties"]
    others = {name: field for name, field in properties.items() if name not in names}
    variants = [
        {
            "type": "object",
            "properties": {
                **others,
                **dict.fromkeys(set(names) - {name}, _NULL),
                name: _without_null(properties[name]),
            },
            "required": [name],
            "additionalProperties": False,
        }
        for name in names
    ]
    return {"oneOf": variants}


def _needs(schema: Schema, name: str, idle: Schema, needed: str) -> None:
    """A field that is more than idle needs another one to be true."""
    is_idle = {"properties": {name: idle}}
    has_other = {"properties": {needed: {"const": True}}, "required": [needed]}
    schema.setdefault("allOf", []).append({"anyOf": [is_idle, has_other]})


def _typed(schema: Schema, with_schema: Callable[[Schema], Schema], plain: Iterable[str]) -> Schema:
    """A form whose other fields go with the type json_schema alone."""
    properties = schema["properties"]
    bare = {"type": {"enum": ["text", "json_object"]}, **dict.fromkeys(plain, _NULL)}
    required = schema.get("required", [])
    variants = [
        {"type": "object", "properties": bare, "required": required, "additionalProperties": False},
        with_schema({**properties, "type": {"const": "json_schema"}}),
    ]
    return {"oneOf": variants}


def _response_format(schema: Schema) -> Schema:
    def full(properties: Schema) -> Schema:
        properties["json_schema"] = _without_null(properties["json_schema"])
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    return _typed(schema, full, ["json_schema"])


def _text_format(schema: Schema) -> Schema:
    def full(properties: Schema) -> Schema:
        needed = ["type", "name", "schema"]
        properties |= {name: _without_null(properties[name]) for name in needed[1:]}
        return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}

    return _typed(schema, full, [name for name in schema["properties"] if name != "type"])


def _function(schema: Schema) -> Schema:
    fits = {"type": "object", "properties": {"type": {"const": "object"}}, "required": ["type"]}
    schema["properties"]["parameters"] = {"anyOf": [fits, _NULL], "default": None}
    return schema


def _has_tools(schema: Schema) -> None:
    """What must be called must be there."""
    is_free = {"properties": {"tool_choice": {"enum": ["none", "auto", None]}}}
    has_tools = {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]}
    schema.setdefault("allOf", []).append({"anyOf": [is_free, has_tools]})


def _chat(schema: Schema) -> Schema:
    _has_tools(schema)
    _needs(schema, "stream_options", _NULL, "stream")
    _needs(schema, "top_logprobs", {"enum": [0, None]}, "logprobs")
    return schema


def _completion(schema: Schema) -> Schema:
    _needs(schema, "stream_options", _NULL, "stream")
    schema["properties"]["best_of"] = {"enum": [1, None], "default": None}
    for kind in schema["properties"]["prompt"]["anyOf"]:
        for text in (kind, kind.get("items", {})):
            if text.get("type") == "string":
                text["minLength"] = 1
    return schema


def _response(schema: Schema) -> Schema:
    _has_tools(schema)
    _needs(schema, "stream_options", _NULL, "stream")
    return schema


def _call(schema: Schema) -> Schema:
    """What clients have read out of the arguments is taken too, and written as JSON again."""
    schema["properties"]["arguments"] = {"description": "JSON as text, or what it says", "default": ""}
    return schema


_RULES: dict[str, Callable[[Schema], Schema]] = {
    "ChatCompletionRequest": _chat,
    "CompletionRequest": _completion,
    "ResponseRequest": _response,
    "TokenizeRequest": lambda schema: _one_of(schema, ("prompt", "messages")),
    "StructuredOutputs": lambda schema: _one_of(schema, ("json", "regex", "choice", "grammar")),
    "ResponseFormat": _response_format,
    "TextFormat": _text_format,
    "FunctionDefinition": _function,
    "ResponseTool": _function,
    "CalledFunction": _call,
}
