"""JSON schemas as llguidance keeps to them: what it would pass over or get wrong is refused by name, or left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeGuard

from pacellm.errors import RequestError
from pacellm.text.schema_ends import ends

Schema = Mapping[str, Any]

MAX_LENGTH = 16_384
"""Of a text that is counted."""
MAX_NUMBER, MIN_NUMBER = 2**53, 1e-15
"""Bounds and listed numbers have a size between these, as far as doubles are exact, or are 0."""
MAX_MULTIPLE = 10_000
"""Of ``multipleOf`` without its decimal point."""
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
_INT64 = 2**63 - 1
_LOOKING = re.compile(r"\(\?<?[=!]|\\[1-9kbB]")
_SINGLE = (
    "items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_ALL: tuple[Any, ...] = (True, {})
# keywords that are not known, with the values that ask for nothing
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,), "contains": (), "propertyNames": (*_ALL, {"type": "string"}),
    "dependentRequired": ({},), "dependentSchemas": ({},), "dependencies": ({},),
    "unevaluatedItems": _ALL, "unevaluatedProperties": _ALL, "not": (False,), "if": _ALL,
    "$dynamicRef": (), "$recursiveRef": (),
}  # fmt: skip
_NEEDS = {"minContains": "contains", "maxContains": "contains", "then": "if", "else": "if"}  # nothing without these
_BEYOND_ZERO: tuple[tuple[str, str, float, Callable[..., float]], ...] = (
    ("exclusiveMinimum", "minimum", MIN_NUMBER, max), ("exclusiveMaximum", "maximum", -MIN_NUMBER, min),
)  # fmt: skip
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


class Unenforceable(Exception):
    """A keyword that cannot be kept to, and why."""

    def __init__(self, keyword: str, reason: str = "cannot be enforced") -> None:
        super().__init__(keyword, reason)
        self.keyword, self.reason = keyword, reason


def enforceable(schema: Schema, param: str, *, is_strict: bool) -> dict[str, Any]:
    """A schema that describes what ``schema`` does, or less where values are very small or names clash.

    Args:
        param: the request's field that it came from.
        is_strict: refuse what cannot be enforced; otherwise it is left out.

    Raises:
        RequestError: names the keyword and where in the schema it is.
    """

    def known(node: Schema, path: str) -> dict[str, Any]:
        found = _named(node)
        for check in _CHECKS:
            try:
                check(found)
            except Unenforceable as error:
                if is_strict:
                    raise _refusal(param, f"{path}/{error.keyword}", error.reason) from None
                found.pop(error.keyword)
                return known(found, path)
        return _with_places(found, path, known)

    found = known(schema, "#")
    found.pop("x-guidance", None)  # llguidance's own, which is not the client's to say
    if not ends(found):
        raise _refusal(param, "#", "describes no JSON that has an end")
    return found


def has_open_names(schema: Schema) -> bool:
    """Whether an object may have other names than those that are listed, so that one of these could be meant by another
    spelling of it (``\\u0061``), or a pattern tells which names or texts there may be."""
    return any(
        "pattern" in node
        or node.get("patternProperties")
        or (node.get("properties") and node.get("additionalProperties") is not False)
        for node in _nodes(schema)
    )


def has_controls(schema: Schema) -> bool:
    """Whether a text that is listed, or a pattern, has control characters that JSON can only write by their number."""
    return any(
        ord(character) < 32 and character not in "\b\f\n\r\t"
        for node in _nodes(schema)
        for text in _texts([node.get("const"), node.get("enum"), node.get("pattern")])
        for character in text
    )


def _refusal(param: str, place: str, reason: str) -> RequestError:
    return RequestError(f"{param}: {place} {reason}", param=param, code="invalid_value")


def _with_places(node: dict[str, Any], path: str, change: Callable[[Schema, str], dict[str, Any]]) -> dict[str, Any]:
    """A schema with those below it changed."""

    def changed(value: Any, place: str) -> Any:
        return change(value, place) if isinstance(value, dict) else value

    found = dict(node)
    for keyword, value in node.items():
        place = f"{path}/{keyword}"
        if keyword in _MAPS and isinstance(value, dict):
            found[keyword] = {name: changed(one, f"{place}/{name}") for name, one in value.items()}
        elif keyword in _LISTS and isinstance(value, list):
            found[keyword] = [changed(one, f"{place}/{number}") for number, one in enumerate(value)]
        elif keyword in _SINGLE:
            found[keyword] = changed(value, place)
    return found


def _nodes(schema: Schema) -> Iterator[Schema]:
    """A schema and all below it."""
    found: list[Schema] = []

    def seen(node: Schema, path: str) -> dict[str, Any]:
        found.append(node)
        return _with_places(dict(node), path, seen)

    seen(schema, "#")
    yield from found


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for one in value:
                yield from _texts(one)
        case dict():
            yield from _texts([*value, *value.values()])


def _named(node: Schema) -> dict[str, Any]:
    """A schema whose ``propertyNames`` are said by other keywords, where they can be."""
    names, found = node.get("propertyNames"), dict(node)
    if not isinstance(names, dict) or node.get("properties") or node.get("patternProperties"):
        return found
    said, value = names.keys() - {"type", "title", "description"}, node.get("additionalProperties", True)
    if names.get("type", "string") != "string" or said not in ({"enum"}, {"pattern"}):
        return found
    pattern, listed = names.get("pattern"), names.get("enum")
    if isinstance(pattern, str):
        found["patternProperties"] = {pattern: value}
    elif isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        found["properties"] = dict.fromkeys(listed, value)
    else:
        return found
    del found["propertyNames"]
    return {**found, "additionalProperties": False}


def _check_known(node: dict[str, Any]) -> None:
    """Keywords that are not known are left out where they ask for nothing."""
    for keyword, needed in _NEEDS.items():
        if keyword in node and needed not in node:
            del node[keyword]
    for keyword, neutral in _UNKNOWN.items():
        if keyword not in node:
            continue
        if not any(type(node[keyword]) is type(one) and node[keyword] == one for one in neutral):
            raise Unenforceable(keyword)
        del node[keyword]


def _check_numbers(node: dict[str, Any]) -> None:
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = node.get(keyword)
        if _is_number(value) and not _is_exact(value) and (keyword, value) != ("maximum", _INT64):
            raise Unenforceable(keyword, f"must be 0, or have a size from {MIN_NUMBER} to {MAX_NUMBER}")
    # 0 itself would be let through beside another bound below 1
    for keyword, other, least, stricter in _BEYOND_ZERO:
        if _is_number(node.get(keyword)) and node[keyword] == 0:
            del node[keyword]
            node[other] = stricter(node[other], least) if _is_number(node.get(other)) else least


def _check_multiple(node: dict[str, Any]) -> None:
    value = node.get("multipleOf")
    if not _is_number(value):
        return
    if value <= 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise Unenforceable("multipleOf", "must be a number above 0")
    scaled = Fraction(repr(value))
    while scaled.denominator > 1:
        scaled *= 10
    if scaled > MAX_MULTIPLE:
        raise Unenforceable("multipleOf", f"must be at most {MAX_MULTIPLE:,} without its decimal point")


def _check_lengths(node: dict[str, Any]) -> None:
    for keyword in _LENGTHS:
        value = node.get(keyword)
        if isinstance(value, float) and value.is_integer():
            node[keyword] = value = int(value)
        if keyword in ("minLength", "maxLength") and isinstance(value, int) and value > MAX_LENGTH:
            raise Unenforceable(keyword, f"must be at most {MAX_LENGTH:,}")
    least, required = node.get("minProperties"), node.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > 1 + len({*map(str, required)}):
        raise Unenforceable("minProperties", "must be at most one more than what is required, as names may come twice")


def _check_listed(node: dict[str, Any]) -> None:
    for keyword in ("const", "enum"):
        if keyword in node and not all(_is_exact(number) for number in _numbers(node[keyword])):
            raise Unenforceable(keyword, f"has a number that is not 0 or of a size from {MIN_NUMBER} to {MAX_NUMBER}")


def _check_format(node: dict[str, Any]) -> None:
    kinds = node.get("type", "string")
    if "format" in node and "string" in (kinds if isinstance(kinds, list) else [kinds]):
        if node["format"] not in FORMATS:
            raise Unenforceable("format", f"must be one of {', '.join(FORMATS)}")
    else:
        node.pop("format", None)


def _check_patterns(node: dict[str, Any]) -> None:
    patterns = {"pattern": [node.get("pattern")], "patternProperties": node.get("patternProperties")}
    for keyword, listed in patterns.items():
        for pattern in listed if isinstance(listed, list | dict) else ():
            if isinstance(pattern, str) and _LOOKING.search(pattern.replace("\\\\", "")):
                raise Unenforceable(keyword, "looks around, back or for the end of a word, which cannot be enforced")


_CHECKS = (
    _check_known, _check_numbers, _check_multiple, _check_lengths, _check_listed, _check_format, _check_patterns,
)  # fmt: skip


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_exact(value: float) -> bool:
    return value == 0 or MIN_NUMBER <= abs(value) <= MAX_NUMBER


def _numbers(value: Any) -> Iterator[float]:
    if _is_number(value):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, dict):
        yield from _numbers([*value.values()])
