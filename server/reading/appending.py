"""Prompts that go on from a session's history, and what a session must know of a prompt for that.

The history is not rendered again: its ids stay as they were logged. What the chat template writes behind it is found by
rendering the new messages behind a stand-in that ends the same way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, get_args

from pacellm.errors import NotAppendable, RequestError
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Append, End, Outline

from .chat_input import ChatInput
from .rendering import rendered_input
from .template_input import TemplateInput
from .text import check_text
from .tools import Tool

Entry = dict[str, Any]
_ENDS: tuple[End, ...] = get_args(End)
_SYSTEM = ("system", "developer")
_MARK = "pacellm-stand-in-7c41"  # what is behind it in a rendering is the template's
_QUESTION: Entry = {"role": "user", "content": "?"}


def outline_of(tokenizer: ChatTokenizer, asked: ChatInput, prompt: list[int]) -> Outline:
    """What a session must know of a conversation's prompt.

    Args:
        prompt: its ids, or its last ones.
    """
    tools = _digest(asked.tools)
    if asked.continues:
        return Outline("answer", 0, "answer", tools)
    role = asked.messages[-1].role
    end: End = "system" if role == "developer" else role
    if end == "tool" and not tokenizer.dialect.has_tools:
        end = "user"
    answered: End = "answer" if asked.adds_prompt else "text"
    opening = _opening(tokenizer, asked)
    if opening is None or prompt[len(prompt) - len(opening) :] != opening:
        return Outline(None, 0, answered, tools)
    return Outline(end, len(opening), answered, tools)


class AppendedMessages:
    """New messages as they follow a session's history, rendered behind stand-ins for what that may end with.

    Args:
        asked: has the new messages.

    Raises:
        RequestError: the template refuses them behind any history.
    """

    def __init__(self, tokenizer: ChatTokenizer, asked: ChatInput) -> None:
        self._tokenizer, self._asked = tokenizer, asked
        self._has_tools = tokenizer.dialect.has_tools
        for number, message in enumerate(asked.messages):
            check_text(message.text(), f"messages.{number}.content")
        literals = tokenizer.literals
        self._tools = [literals.shielded_value(tool.shown()) for tool in asked.tools] or None
        self._variables = literals.shielded_value(dict(asked.variables or {}))
        self._template = TemplateInput(tokenizer, asked.messages, asked.tools, is_open=asked.continues, is_behind=True)
        self._new = self._template.messages()
        self._texts = {end: self._attempt(end) for end in _ENDS}
        found = [text for text in self._texts.values() if isinstance(text, str)]
        if not found:
            raise next(error for error in self._texts.values() if isinstance(error, RequestError))
        self.text = found[0]

    def encoded(self, limit: int | None, scope: str | None) -> tuple[list[int], Append]:
        """The longest tail's ids, and all of them by the history's end.

        Args:
            limit: the model's context; what is longer for certain is refused before tokenising.
            scope: whose texts these are, as tenant and session.

        Raises:
            ContextLengthExceeded: they alone are longer.
        """
        known: dict[str, list[int]] = {}
        for text in self._texts.values():
            if isinstance(text, str) and text not in known:
                known[text] = self._tokenizer.encode_behind(text, limit=limit, scope=scope, is_chat=True)
        tails = {end: known[text] if isinstance(text, str) else text for end, text in self._texts.items()}
        try:
            rendered = rendered_input(self._tokenizer, self._asked)
            whole: list[int] | RequestError = self._tokenizer.encode_chat(rendered, limit=limit, scope=scope)
        except RequestError as error:
            whole = error
        return max(known.values(), key=len), Append(tails, whole, needs_tools=self._needs_tools)

    def _attempt(self, end: End) -> str | RequestError:
        """What follows a history that ends so, or why nothing can."""
        try:
            text = self._behind(end)
        except RequestError as error:
            return error
        for number, message in enumerate(self._asked.messages):
            content = self._tokenizer.literals.shielded(message.text()).strip()
            if message.role in _SYSTEM and content not in text:
                return RequestError(
                    "the model's chat template shows a system message at the beginning only; it cannot be appended",
                    param=f"messages.{number}.role",
                )
        return text

    @property
    def _needs_tools(self) -> bool:
        """The tools are shown, and not behind the history."""
        if self._tools is None:
            return False
        end = next(end for end, text in self._texts.items() if isinstance(text, str))
        self._has_tools = False
        without, self._has_tools = self._attempt(end), self._tokenizer.dialect.has_tools
        return without == self._texts[end]

    def _behind(self, end: End) -> str:
        results = list(itertools.takewhile(lambda entry: entry["role"] == "tool", self._new))
        calls = [_call(entry["tool_call_id"], entry["name"]) for entry in results]
        answer = [_QUESTION, {"role": "assistant", "content": _MARK}]
        if end == "tool":
            if not self._tokenizer.dialect.has_tools:
                raise NotAppendable(
                    "with this model's chat template no history ends with a result; send the whole history without "
                    "pacellm.append", param="pacellm.append",
                )  # fmt: skip
            result = {"role": "tool", "content": _MARK, "tool_call_id": "standin00", "name": "f"}
            return self._after([_QUESTION, self._calling([_call("standin00", "f"), *calls]), result])
        if end in ("system", "user"):
            if results:
                raise RequestError(
                    f"a result follows its call, but the session's history ends with a message of the role {end}",
                    param="messages.0.role",
                )
            return self._after([{"role": end, "content": _MARK}])
        if not results:
            return self._after(answer, with_end=end == "answer")
        text = self._after([_QUESTION, self._calling([*calls[:-1], _call(calls[-1]["id"], _MARK)])])
        return text if end != "answer" else self._end_of(answer) + text

    def _calling(self, calls: list[Entry]) -> Entry:
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def _after(self, before: list[Entry], *, with_end: bool = False) -> str:
        """What the template writes behind a stand-in, or already behind the stand-in's text."""
        asked = self._asked
        rendered = self._render(
            [*before, *self._new], add_generation_prompt=asked.adds_prompt, continue_final_message=asked.continues
        )
        text = _behind_mark(rendered)
        if with_end:
            return text
        end = self._end_of(before)
        if not text.startswith(end):
            raise NotAppendable(
                "the model's chat template writes a message another way once others follow it; send the whole history "
                "without pacellm.append", param="pacellm.append",
            )  # fmt: skip
        return text[len(end) :]

    def _end_of(self, before: list[Entry]) -> str:
        """What the template writes at a message's end."""
        return _behind_mark(_closed(self._tokenizer, before, self._render))

    def _render(self, entries: list[Entry], **options: Any) -> str:
        tools = self._tools if self._has_tools else None
        rendered = self._tokenizer.render(entries, tools=tools, variables=self._variables, **options)
        rendered = self._template.restored(rendered)
        check_text(rendered, "messages")
        return rendered


def _call(call_id: str, name: str) -> Entry:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}}


def _behind_mark(text: str) -> str:
    """What stands behind the mark.

    Raises:
        NotAppendable: the template has not written it.
    """
    _, mark, rest = text.partition(_MARK)
    if not mark:
        raise NotAppendable(
            "the model's chat template has no place for messages behind such a history; send the whole history "
            "without pacellm.append", param="pacellm.append",
        )  # fmt: skip
    return rest


def _closed(tokenizer: ChatTokenizer, entries: list[Entry], render: Callable[..., str]) -> str:
    """Whole messages, without the end of text that some templates write where no answer is to follow."""
    text = render(entries, add_generation_prompt=False)
    bare = text.removesuffix(tokenizer.end_text)
    if bare == text:
        return text
    opened = render(entries, add_generation_prompt=True)
    return bare if opened.startswith(bare) and not opened.startswith(text) else text


def _opening(tokenizer: ChatTokenizer, asked: ChatInput) -> list[int] | None:
    """Ids behind a prompt's last message; None where the template writes that another way before them."""

    def render(entries: list[Entry], **options: Any) -> str:
        return tokenizer.render(entries, variables=variables, **options)

    variables = tokenizer.literals.shielded_value(dict(asked.variables or {}))
    try:
        closed = _closed(tokenizer, [_QUESTION], render)
        whole = render([_QUESTION], add_generation_prompt=asked.adds_prompt)
    except RequestError:
        return None
    return tokenizer.encode_behind(whole[len(closed) :], is_chat=True) if whole.startswith(closed) else None


def _digest(tools: Sequence[Tool]) -> int:
    """A number for tools as they are shown; 0 for none."""
    if not tools:
        return 0
    text = json.dumps([tool.shown() for tool in tools], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1 or 1
