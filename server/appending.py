"""Prompts that go on from a session's history, and what a session must know of a prompt for that.

The history is not rendered again: its ids stay as they were logged. What the chat template writes behind it is found by
rendering the new messages behind a stand-in that ends the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, get_args

from pacellm.errors import NotAppendable, RequestError
from pacellm.tokenizer import ChatTokenizer
from pacellm.types import Append, End, Outline
from server.conversation import for_template
from server.prompts import chat_prompt, check_text
from server.schema.tools import Tool
from server.schema.turn import TurnRequest

Entry = dict[str, Any]
_ENDS: tuple[End, ...] = get_args(End)
_MARK = "pacellm-stand-in-7c41"  # what is behind it in a rendering is the template's
_QUESTION: Entry = {"role": "user", "content": "?"}


def outline_of(tokenizer: ChatTokenizer, asked: TurnRequest, prompt: list[int]) -> Outline:
    """What a session must know of a conversation's prompt.

    Args:
        prompt: its ids, or its last ones.
    """
    tools = _digest(asked.tools)
    if asked.continues:
        return Outline("answer", 0, "answer", tools)
    role = asked.messages[-1].role
    end: End = "system" if role == "developer" else role
    if end == "tool" and not tokenizer.dialect.reads_results:
        end = "user"
    if not asked.adds_prompt:
        return Outline(end, 0, "text", tools)
    opening = _opening(tokenizer, asked)
    if opening is None or prompt[len(prompt) - len(opening) :] != opening:
        return Outline(None, 0, "answer", tools)
    return Outline(end, len(opening), "answer", tools)


def append_of(
    tokenizer: ChatTokenizer, asked: TurnRequest, limit: int | None, scope: str | None
) -> tuple[str, list[int], Append]:
    """New messages as they follow a session's history: their text, their ids, and these by the history's end.

    Args:
        limit: the model's context; what is longer for certain is refused before tokenising.
        scope: whose texts these are, as tenant and session.

    Raises:
        RequestError: the template refuses them behind any history.
    """
    for number, message in enumerate(asked.messages):
        check_text(message.text(), f"messages.{number}.content")
    follower = _Follower(tokenizer, asked)
    texts = {end: follower.attempt(end) for end in _ENDS}
    found = next((text for text in texts.values() if isinstance(text, str)), None)
    if found is None:
        raise next(error for error in texts.values() if isinstance(error, RequestError))
    known: dict[str, list[int]] = {}
    for text in texts.values():
        if isinstance(text, str) and text not in known:
            known[text] = tokenizer.encode_behind(text, limit=limit, scope=scope)
    tails = {end: known[text] if isinstance(text, str) else text for end, text in texts.items()}
    try:
        whole: list[int] | RequestError = chat_prompt(tokenizer, asked, limit, scope)[1]
    except RequestError as error:
        whole = error
    return found, max(known.values(), key=len), Append(tails, whole, needs_tools=follower.needs_tools)


class _Follower:
    """Renders new messages behind stand-ins.

    Args:
        asked: has the new messages.

    Raises:
        RequestError: they cannot be shown to this model.
    """

    def __init__(self, tokenizer: ChatTokenizer, asked: TurnRequest) -> None:
        self._tokenizer, self._asked = tokenizer, asked
        self._reads_tools = tokenizer.dialect.reads_tools
        self._tools: list[dict[str, Any]] | None = [tool.shown() for tool in asked.tools] or None
        self._new = for_template(asked.messages, (), tokenizer.dialect)

    def attempt(self, end: End) -> str | RequestError:
        """What follows a history that ends so, or why nothing can."""
        try:
            text = self._behind(end)
        except RequestError as error:
            return error
        for number, message in enumerate(self._asked.messages):
            if message.role in ("system", "developer") and message.text().strip() not in text:
                return RequestError(
                    "the model's chat template shows a system message at the beginning only; it cannot be appended",
                    param=f"messages.{number}.role",
                )
        return text

    @property
    def needs_tools(self) -> bool:
        """The tools are shown, and not behind the history."""
        if self._tools is None:
            return False
        with_tools, self._reads_tools = self.attempt("answer"), False
        without, self._reads_tools = self.attempt("answer"), self._tokenizer.dialect.reads_tools
        return with_tools == without

    def _behind(self, end: End) -> str:
        results = [entry for entry in self._new if entry["role"] == "tool"]
        calls = [_call(entry["tool_call_id"], entry["name"]) for entry in results]
        leads = self._new[0]["role"] == "tool"
        match end:
            case "system" | "user" if leads:
                raise RequestError(
                    f"a result follows its call, but the session's history ends with a message of the role {end}",
                    param="messages.0.role",
                )
            case "system" | "user":
                return self._after_mark([{"role": end, "content": _MARK}])
            case "tool":
                calls = [_call("standin00", "f"), *(calls if leads else ())]
                asking = {"role": "assistant", "content": "", "tool_calls": calls}
                result = {"role": "tool", "content": _MARK, "tool_call_id": "standin00", "name": "f"}
                return self._after_mark([_QUESTION, asking, result])
        answer = [_QUESTION, {"role": "assistant", "content": _MARK}]
        if not leads:
            return self._after_mark(answer, closed=end != "answer")
        before = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]
        text = self._without(self._rendered([*before, *self._new], is_last=True), self._rendered(before))
        return text if end != "answer" else _after(self._rendered(answer)) + text

    def _after_mark(self, before: list[Entry], *, closed: bool = True) -> str:
        """What the template writes behind the stand-in's text, or behind its end where it is closed."""
        text = _after(self._rendered([*before, *self._new], is_last=True))
        return self._without(text, _after(self._rendered(before))) if closed else text

    def _without(self, text: str, beginning: str) -> str:
        if not text.startswith(beginning):
            raise NotAppendable(
                "the model's chat template writes a message another way once others follow it; send the whole history "
                "without pacellm.append", param="pacellm.append",
            )  # fmt: skip
        return text[len(beginning) :]

    def _rendered(self, entries: list[Entry], *, is_last: bool = False) -> str:
        asked = self._asked
        return self._tokenizer.render(
            entries,
            tools=self._tools if self._reads_tools else None,
            add_generation_prompt=is_last and asked.adds_prompt,
            continue_final_message=is_last and asked.continues,
            variables=asked.variables,
        )


def _call(call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}}


def _after(text: str) -> str:
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


def _opening(tokenizer: ChatTokenizer, asked: TurnRequest) -> list[int] | None:
    """Ids that begin an answer; None where the template writes more than that for it."""
    try:
        closed, opened = (
            tokenizer.render([_QUESTION], add_generation_prompt=adds, variables=asked.variables)
            for adds in (False, True)
        )
    except RequestError:
        return None
    return tokenizer.encode_behind(opened[len(closed) :]) if opened.startswith(closed) else None


def _digest(tools: Sequence[Tool]) -> int:
    """A number for tools as they are shown; 0 for none."""
    if not tools:
        return 0
    text = json.dumps([tool.shown() for tool in tools], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1 or 1
