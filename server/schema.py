"""What all bodies share: strictness, and problems in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from pacellm.errors import RequestError, UnsupportedParameter

SESSION_ID = r"^[A-Za-z0-9._:-]{1,256}$"
RESPONSE_PREFIX = "resp_"  # of sessions that stored responses are
MAX_KEYS = 4096  # of an object
_UNION_BRANCHES = ("str", "constrained-str", "int", "float", "bool", "TextPart", "dict", "list")


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Of an integer field: 16.0 is one too, which clients write whose language has one kind of number."""


class Strict(BaseModel):
    """No conversions between types and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


Body = TypeVar("Body", bound=Strict)


def parse(kind: type[Body], body: bytes | bytearray) -> Body:
    """A checked body.

    Raises:
        RequestError: names the field.
    """
    try:
        # what is looked at are keys: of numbers their length will do
        json.loads(body, object_pairs_hook=_each_once, parse_int=len, parse_float=len, parse_constant=len)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from None


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object that has a key twice, one of whose values would be dropped, and one with very many keys, as each
    that is wrong would be described.

    Raises:
        RequestError: names the key.
    """
    if len(pairs) > MAX_KEYS:
        raise RequestError(f"an object of the body has more than {MAX_KEYS:,} keys", code="body_too_complex")
    if len(pairs) > 1 and len(names := [name for name, _ in pairs]) != len(set(names)):
        twice = next(name for number, name in enumerate(names) if name in names[:number])[:80]
        raise RequestError(f"the body has the key {twice!r} twice", param=twice, code="invalid_json")


def refuse_unless_neutral(body: Strict, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Refuse fields that are accepted only where their value means "as usual".

    Raises:
        UnsupportedParameter: another value, which would change the result.
    """
    for name, usual in neutral.items():
        value = getattr(body, name)
        if value is not None and not any(type(value) is type(one) and value == one for one in usual):
            raise UnsupportedParameter(f"{name} is not supported here with this value", param=name)


def _places(problem: Any) -> list[str]:
    """The fields on the way to a problem; a union's branches are part of the location, but no fields."""
    return [
        str(place)[:80]
        for place in problem["loc"]
        if isinstance(place, int) or ("[" not in place and place not in _UNION_BRANCHES and not place[:1].isupper())
    ]


def _most_telling(problems: list[Any]) -> Any:
    """Of the first wrong field's problems, one for each branch of a union, that of the branch that fits best: of the
    right type before the wrong one, deep before shallow."""
    location = problems[0]["loc"]
    field = location[: 3 if location[:1] == ("messages",) else 1]
    candidates = (problem for problem in problems if problem["loc"][: len(field)] == field)
    return max(candidates, key=lambda p: (not p["type"].endswith(("_type", "_parsing")), len(_places(p))))


def _request_error(error: ValidationError) -> RequestError:
    """The first problem, in OpenAI's form."""
    first = _most_telling(error.errors(include_url=False, include_context=False, include_input=False))
    param = ".".join(_places(first)) or None
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "item_type":
        param = f"{param}.type"
    if first["type"] == "extra_forbidden":
        return UnsupportedParameter(f"{param} is not a parameter of this endpoint", param=param)
    if first["type"] == "too_short" and param == "messages":
        return RequestError("messages must have at least one message", param="messages", code="invalid_value")
    return RequestError(f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value")
