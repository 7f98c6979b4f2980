"""Tools for models whose chat template has no known form for them: one form in plain words, for every template.

The tools stand at the end of the system message. Every answer begins with ``<tool_call>`` around a call in JSON, or
with ``<answer>`` and text; further calls are on lines of their own. Results come as a user's message. Wording and marks
are those with which SmolLM2-135M best told what to call from what to answer, and ended once it had a result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pacellm.text.dialect import ANSWER, CALL
from pacellm.text.literals import Literals

Entry = dict[str, Any]
_SYSTEM = ("system", "developer")
_EXAMPLES: dict[str, Any] = {"integer": 0, "number": 0, "boolean": False, "array": []}  # by type


class GenericTools:
    """The form's texts for one tokenizer.

    Args:
        literals: of the tokenizer; the marks are text, as they are in what is generated.
    """

    def __init__(self, literals: Literals) -> None:
        self._begin, self._end, self._answer = (literals.shielded(mark, own=True) for mark in (*CALL, ANSWER))

    def introduction(self, functions: Sequence[dict[str, Any]]) -> str:
        """What the model is told.

        Args:
            functions: each with ``name``, and ``description`` and ``parameters`` where it has them.
        """
        listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        first = functions[0]
        example = self._call({"name": first["name"], "arguments": _example(first.get("parameters") or {})})
        call = f"{self._begin}...{self._end}"
        return (
            f"You can call functions:\n{listed}\n\n"
            f"If a function helps with the request, call it at once:\n{example}\n"
            f'The result of {call} comes as "Result of NAME: ...", and you answer the user with it:\n'
            f"{self._answer}\n"
            f"If no function helps, answer by yourself:\n{self._answer}"
        )

    def answer(self, content: str, calls: Iterable[dict[str, Any]]) -> str:
        """An earlier answer as it was generated.

        Args:
            calls: each with ``name`` and ``arguments``.
        """
        written = "\n".join(self._call(call) for call in calls)
        if not written:
            return self._answer + content
        return f"{content}\n{written}" if content else written

    def _call(self, call: dict[str, Any]) -> str:
        return f"{self._begin}{json.dumps(call, ensure_ascii=False)}{self._end}"


def results_text(results: Sequence[tuple[str, str]]) -> str:
    """Results of calls, by name, as one message."""
    lines = [f"Result of {name}: {text}" for name, text in results]
    return "\n".join(lines) + f"\n\nAnswer the user with {'this result' if len(lines) == 1 else 'these results'}."


def with_system(messages: list[Entry], text: str) -> list[Entry]:
    """A text at the end of the system message, or in one of its own."""
    if messages and messages[0]["role"] in _SYSTEM:
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def fitted(messages: list[Entry], *, takes_system: bool, takes_runs: bool) -> list[Entry]:
    """Messages for a template that refuses some.

    Args:
        takes_system: there may be a system message; otherwise it goes before the first user's.
        takes_runs: a role may speak twice in a row; otherwise such messages become one.
    """
    if not takes_system and messages[0]["role"] in _SYSTEM:
        first = {**messages[0], "role": "user"}
        is_followed = len(messages) > 1 and messages[1]["role"] == "user"
        messages = [_joined(first, messages[1]), *messages[2:]] if is_followed else [first, *messages[1:]]
    if takes_runs:
        return messages
    found: list[Entry] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1] = _joined(found[-1], message)
        else:
            found.append(message)
    return found


def _joined(first: Entry, second: Entry) -> Entry:
    return {**first, **second, "content": f"{first['content']}\n\n{second['content']}"}


def _example(schema: dict[str, Any]) -> Any:
    """Something of a schema's form, with no content."""
    if "enum" in schema and isinstance(schema["enum"], list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        return _example_object(schema.get("required"), schema.get("properties"))
    return _EXAMPLES.get(kind, "...") if isinstance(kind, str) else "..."


def _example_object(wanted: Any, properties: Any) -> dict[str, Any]:
    if not isinstance(wanted, list) or not isinstance(properties, dict):
        return {}
    return {name: _example(properties.get(name) or {}) for name in wanted if isinstance(name, str)}
