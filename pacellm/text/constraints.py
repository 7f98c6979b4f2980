"""What an answer must look like, as grammars of llguidance. Text only: ``pacellm/text/grammar.py`` compiles it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pacellm.text.dialect import ANSWER, CALL

MAX_CALLS = 32
"""Calls in one constrained answer."""

# between JSON's tokens: what people and models write, but no endless runs of it
_BLANK = r"[ ]?|\n[ ]{0,20}"
# as json.dumps and the chat templates' tojson write, so that an answer sent back is the text that was generated
_TOJSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LENIENT = {"lenient": True, "coerce_one_of": True}


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
    """JSON that a schema describes."""
    options = {"whitespace_pattern": _BLANK, **({} if is_strict else _LENIENT)}
    return Grammar((Part("json", param, schema={"x-guidance": options, **schema}),))


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
        options = {**_TOJSON, **({} if function.is_strict else _LENIENT)}
        schema = {**function.parameters, "x-guidance": options}
        parts.append(Part(f"arguments_{number}", function.param, schema=schema))
    return rules, tuple(parts)
