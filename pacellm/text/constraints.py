"""What an answer must look like, as grammars of llguidance. Text only: ``pacellm/text/grammar.py`` compiles it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pacellm.text.dialect import ANSWER, CALL
from pacellm.text.json_schema import MAX_LENGTH, enforceable, has_controls, has_open_names

MAX_CALLS = 32
"""Calls in one constrained answer."""

# between JSON's tokens: what people and models write, but no endless runs of it
_BLANK = r"[ ]?|\n[ ]{0,20}"
# as json.dumps and the chat templates' tojson write, so that an answer sent back is the text that was generated
_TOJSON = (", ", ": ")
_LENIENT = {"lenient": True, "coerce_one_of": True}
# characters by their numbers: any, as llguidance would go on from "\\u00" with a control character only; or none, where
# one might be another spelling of a name
_ANY_NUMBER, _NO_NUMBER = {"json_allow_general_unicode_escapes": True}, {"json_allowed_escapes": 'nrbtf"\\'}
_ANNOTATIONS = frozenset(("type", "title", "description", "$schema", "$id", "$comment", "default", "examples"))
_PAIR = r"[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # of surrogates, which is one character
_NUMBERED = rf"u([0-9a-ce-fA-CE-F][0-9a-fA-F]{{3}}|[dD][0-7][0-9a-fA-F]{{2}}|{_PAIR})"
_TEXT = rf'"([^"\\\x00-\x1f\x7f]|\\(["\\\/bfnrt]|{_NUMBERED})){{0,{MAX_LENGTH}}}"'
_DEPTH, _MEMBERS = 16, 1024  # of JSON that no schema describes: so it ends


@dataclass(frozen=True)
class Part:
    """A grammar with a name, by which others refer to it (``@name``): a JSON schema or a Lark grammar.

    Attributes:
        param: the request's field that it came from.
    """

    name: str
    param: str
    schema: Mapping[str, Any] | None = None
    lark: str | None = None

    def compiled(self) -> dict[str, Any]:
        """The part as llguidance takes it."""
        body = {"lark_grammar": self.lark} if self.schema is None else {"json_schema": self.schema}
        return {"name": self.name, **body}


@dataclass(frozen=True)
class Grammar:
    """A whole answer's form; the first part is where it begins."""

    parts: tuple[Part, ...]

    @property
    def start(self) -> Part:
        """The first part."""
        return self.parts[0]

    def within(self, name: str, lark: str) -> Grammar:
        """This grammar inside another, which refers to it by the name of its first part."""
        return Grammar((Part(name, self.start.param, lark=lark), *self.parts))

    def text(self) -> str:
        """For llguidance."""
        return json.dumps({"grammars": [part.compiled() for part in self.parts]})


@dataclass(frozen=True)
class Function:
    """A tool's function. Where it is not strict, keywords of its schema that cannot be enforced are passed over."""

    name: str
    param: str
    parameters: Mapping[str, Any]
    is_strict: bool = False


@dataclass(frozen=True)
class Mark:
    """What stands before and after a region of an answer, as ``<think>`` and ``</think>``.

    Attributes:
        tokens: their ids, where both are single tokens that are no text.
    """

    begin: str
    end: str
    tokens: tuple[int, int] | None = None

    @property
    def opening(self) -> str:
        """The beginning in a Lark rule."""
        return quoted(self.begin) if self.tokens is None else f"<[{self.tokens[0]}]>"

    @property
    def closing(self) -> str:
        """The end in a Lark rule."""
        return quoted(self.end) if self.tokens is None else f"<[{self.tokens[1]}]>"


def of_json(schema: Mapping[str, Any], param: str, *, is_strict: bool = True) -> Grammar:
    """JSON that a schema describes.

    Raises:
        RequestError: a keyword that cannot be enforced, if ``is_strict``.
    """
    return Grammar((_json_part("json", param, schema, None, is_strict=is_strict),))


def _json_part(
    name: str, param: str, schema: Mapping[str, Any], separators: tuple[str, str] | None, *, is_strict: bool
) -> Part:
    """JSON that a schema describes.

    Args:
        separators: between items, and between a key and its value, where nothing else may be; blanks where it is None.
    """
    if schema.keys() <= _ANNOTATIONS and schema.get("type", "object") == "object":
        return Part(name, param, lark=_free_json(separators, only_object="type" in schema))
    found = enforceable(schema, param, is_strict=is_strict)
    options: dict[str, Any] = {"whitespace_pattern": _BLANK}
    if separators is not None:
        options = {"whitespace_flexible": False, "item_separator": separators[0], "key_separator": separators[1]}
    options |= {} if has_controls(found) else _NO_NUMBER if has_open_names(found) else _ANY_NUMBER
    options |= {} if is_strict else _LENIENT
    return Part(name, param, schema={**found, "x-guidance": options})


def _free_json(separators: tuple[str, str] | None, *, only_object: bool) -> str:
    """Any JSON, or any object, whose numbers, texts, lists and depth have an end."""
    comma, colon = (quoted(text) for text in separators or (",", ":"))
    blank = "" if separators is not None else "_B?"
    rules = [f"start: {'object_0' if only_object else 'value_0'}", f"value_{_DEPTH}: scalar"]
    for depth in range(_DEPTH):
        value, item = f"value_{depth + 1}", f"item_{depth}"
        rules += [
            f"value_{depth}: scalar | object_{depth} | array_{depth}",
            f"{item}: {value} {blank}",
            f"member_{depth}: TEXT {blank} {colon} {blank} {value} {blank}",
            _listing(f"object_{depth}", "{}", f"member_{depth}", comma, blank),
            _listing(f"array_{depth}", "[]", item, comma, blank),
        ]
    rules += [
        'scalar: TEXT | NUMBER | "true" | "false" | "null"',
        f"TEXT: /{_TEXT}/",
        r"NUMBER: /-?(0|[1-9][0-9]{0,19})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,2})?/",
        *([] if separators is not None else [r"_B: /[ ]|\n[ ]{0,20}/"]),
    ]
    return "\n".join(rules)


def _listing(name: str, brackets: str, entry: str, comma: str, blank: str) -> str:
    """A rule of entries between brackets."""
    begin, end = (quoted(bracket) for bracket in brackets)
    return f"{name}: {begin} {blank} ({entry} ({comma} {blank} {entry}){{0,{_MEMBERS - 1}}})? {end}"


def of_regex(regex: str, param: str) -> Grammar:
    """Text that a regular expression matches as a whole."""
    escaped, is_escaped = "", False
    for character in regex:
        escaped += {"/": "/" if is_escaped else "\\/", "\n": "n" if is_escaped else "\\n"}.get(character, character)
        is_escaped = character == "\\" and not is_escaped
    return Grammar((Part("regex", param, lark=f"start: /{escaped}/"),))


def of_lark(grammar: str, param: str) -> Grammar:
    """What a Lark grammar describes, in llguidance's variant."""
    return Grammar((Part("lark", param, lark=grammar),))


def of_choice(choices: Iterable[str], param: str) -> Grammar:
    """One of several texts. As one terminal, since alternatives of a rule may only be 2,000."""
    listed = " | ".join(quoted(text) for text in choices)
    return Grammar((Part("choice", param, lark=f"start: CHOICE\nCHOICE: {listed}"),))


def of_calls(functions: Sequence[Function], *, only_one: bool) -> Grammar:
    """A JSON list of calls, ``[{"name": ..., "arguments": {...}}]``, and nothing else."""
    more = "" if only_one else f' (", " call){{0,{MAX_CALLS - 1}}}'
    rules, parts = _call_rules(functions)
    return Grammar((Part("calls", "tools", lark=f'start: "[" call{more} "]"\n{rules}'), *parts))


def of_marked_calls(
    functions: Sequence[Function],
    mark: Mark,
    *,
    only_one: bool,
    with_text: bool = False,
    otherwise: Grammar | None = None,
) -> Grammar:
    """Calls between marks, each on lines of its own.

    Args:
        with_text: calls may come after text, and there may be none.
        otherwise: what may be there instead of calls.
    """
    rules, parts = _call_rules(functions)
    body = r'"\n" call "\n" ' if mark.tokens is None else r"/\n?/ call /\n?/ "
    marked = f"marked: begin {body}{mark.closing}\n"
    if with_text:
        opening = "TEXT " + mark.opening
        begin = f"begin{'[lazy]' if mark.tokens is None else ''}: {opening}\nTEXT: /(.|\\n)*/\ntail: TEXT\n"
        start = "tail | marked" if only_one else f"marked{{0,{MAX_CALLS}}} tail"
    else:
        begin = f"begin: {mark.opening}\n"
        start = "marked" if only_one else f'marked ("\\n" marked){{0,{MAX_CALLS - 1}}}'
    others = () if otherwise is None else otherwise.parts
    start += "" if otherwise is None else f" | @{otherwise.start.name}"
    return Grammar((Part("calls", "tools", lark=f"start: {start}\n{marked}{begin}{rules}"), *parts, *others))


def of_generic_answer(
    functions: Sequence[Function], *, only_one: bool, is_forced: bool, otherwise: Grammar | None = None
) -> Grammar:
    """Calls between marks, or an answer behind its own mark (``server/reading/generic_tools.py``).

    Args:
        functions: none where nothing may be called.
        is_forced: calls only.
        otherwise: what the answer must look like.
    """
    begin, end = (quoted(mark) for mark in CALL)
    answer = f"answer: {quoted(ANSWER)} " + ("TEXT" if otherwise is None else f"@{otherwise.start.name}") + "\n"
    answer += "TEXT: /([^ \\t\\r\\n](.|\\n)*)?/\n" if otherwise is None else ""
    others = () if otherwise is None else otherwise.parts
    if not functions:
        return Grammar((Part("answer", "tools", lark=f"start: answer\n{answer}"), *others))
    more = "" if only_one else f' ("\\n" marked){{0,{MAX_CALLS - 1}}}'
    rules, parts = _call_rules(functions)
    rules = f"marked: {begin} call {end}\n{rules}"
    if is_forced:
        return Grammar((Part("calls", "tools", lark=f"start: marked{more}\n{rules}"), *parts))
    lark = f"start: answer | marked{more}\n{answer}{rules}"
    return Grammar((Part("calls", "tools", lark=lark), *parts, *others))


def after_reasoning(grammar: Grammar, mark: Mark, *, is_open: bool) -> Grammar:
    """A grammar for what follows reasoning.

    Args:
        is_open: the prompt has already begun the reasoning; otherwise there may be none.
    """
    lazy = "[lazy]" if mark.tokens is None else ""
    rules = f"close{lazy}: TEXT {mark.closing}\n"
    rules += "TEXT: /(.|\\n)*/\nBLANK: /[ \\n]{1,4}/\n"
    begin = "close BLANK?" if is_open else f"({mark.opening} close BLANK?)?"
    return grammar.within("reasoned", f"start: {begin} @{grammar.start.name}\n{rules}")


def after_space(grammar: Grammar) -> Grammar:
    """A grammar for tokenizers whose decoder takes one space off the beginning of every text."""
    return grammar.within("spaced", f'start: " " @{grammar.start.name}\n')


def quoted(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _call_rules(functions: Sequence[Function]) -> tuple[str, tuple[Part, ...]]:
    """The rule ``call``, and the functions' arguments that it refers to."""
    names = " | ".join(f"call_{number}" for number in range(len(functions)))
    rules, parts = f"call: {names}\n", []
    for number, function in enumerate(functions):
        head = quoted(f'{{"name": "{function.name}", "arguments": ')
        rules += f'call_{number}: {head} @arguments_{number} "}}"\n'
        name, schema = f"arguments_{number}", function.parameters
        parts.append(_json_part(name, function.param, schema, _TOJSON, is_strict=function.is_strict))
    return rules, tuple(parts)
