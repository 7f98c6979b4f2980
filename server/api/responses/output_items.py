"""Output items of the Responses API out of the pieces of a message."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from ...writing.tool_calls import MessageDelta

Fields = dict[str, Any]
Event = tuple[str, Fields]  # type and fields, without a sequence number
_TEXT = {"text": "output_text", "reasoning": "reasoning_text"}


class _Item:
    """One item while it is written.

    Args:
        index: its place in the output.
        prefix: of its id.
    """

    def __init__(self, index: int, prefix: str) -> None:
        self._place: Fields = {"item_id": f"{prefix}_{uuid.uuid4().hex}", "output_index": index}
        self.text: list[str] = []

    def begin(self) -> Iterator[Event]:
        """That it is there."""
        yield "response.output_item.added", {"output_index": self._place["output_index"], "item": self.shown(None)}

    def push(self, text: str) -> Event:
        """More of it."""
        raise NotImplementedError

    def end(self, status: str) -> Iterator[Event]:
        """That it is whole, or cut."""
        yield "response.output_item.done", {"output_index": self._place["output_index"], "item": self.shown(status)}

    def shown(self, status: str | None) -> Fields:
        """As the output has it; None where it has just begun."""
        raise NotImplementedError


class TextItem(_Item):
    """A message, or reasoning: one part of text.

    Args:
        index: its place in the output.
        kind: "text" or "reasoning".
    """

    def __init__(self, index: int, kind: str) -> None:
        super().__init__(index, "msg" if kind == "text" else "rs")
        self.kind, self._name = kind, f"response.{_TEXT[kind]}"
        self._more: Fields = {"logprobs": []} if kind == "text" else {}
        self._place["content_index"] = 0

    def begin(self) -> Iterator[Event]:
        """The item and its part."""
        yield from super().begin()
        yield "response.content_part.added", {**self._place, "part": self._part("")}

    def push(self, text: str) -> Event:
        """More of the text."""
        self.text.append(text)
        return f"{self._name}.delta", {**self._place, "delta": text, **self._more}

    def end(self, status: str) -> Iterator[Event]:
        """Text, part and item."""
        text = "".join(self.text)
        yield f"{self._name}.done", {**self._place, "text": text, **self._more}
        yield "response.content_part.done", {**self._place, "part": self._part(text)}
        yield from super().end(status)

    def shown(self, status: str | None) -> Fields:
        """The item."""
        content = [] if status is None else [self._part("".join(self.text))]
        shared = {"id": self._place["item_id"], "status": status or "in_progress", "content": content}
        if self.kind == "reasoning":
            return {**shared, "type": "reasoning", "summary": []}
        return {**shared, "type": "message", "role": "assistant"}

    def _part(self, text: str) -> Fields:
        return {"type": _TEXT[self.kind], "text": text, **({"annotations": [], "logprobs": []} if self._more else {})}


class FunctionCallItem(_Item):
    """A call of a function.

    Args:
        index: its place in the output.
        piece: the call's first, as chat has it.
    """

    kind = "call"

    def __init__(self, index: int, piece: Fields) -> None:
        super().__init__(index, "fc")
        self.call_id, self.name = piece["id"], piece["function"]["name"]

    def push(self, text: str) -> Event:
        """More of the arguments."""
        self.text.append(text)
        return "response.function_call_arguments.delta", {**self._place, "delta": text}

    def end(self, status: str) -> Iterator[Event]:
        """Arguments and item."""
        whole = {**self._place, "name": self.name, "arguments": "".join(self.text)}
        yield "response.function_call_arguments.done", whole
        yield from super().end(status)

    def shown(self, status: str | None) -> Fields:
        """The item."""
        return {
            "id": self._place["item_id"],
            "type": "function_call",
            "status": status or "in_progress",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self.text),
        }


class OutputItems:
    """The items of one response, one after the other."""

    def __init__(self) -> None:
        self._open: TextItem | FunctionCallItem | None = None
        self._message: Fields = {"role": "assistant", "content": ""}
        self.output: list[Fields] = []

    @property
    def is_reasoning(self) -> bool:
        """Nothing has been said yet but reasoning."""
        return self._open is not None and self._open.kind == "reasoning" and not self.output

    def push(self, piece: MessageDelta) -> Iterator[Event]:
        """What a piece adds."""
        for call in piece.get("tool_calls", ()):
            if "id" in call:
                yield from self._next(FunctionCallItem(self._place, call))
            yield from self._add(call["function"]["arguments"])
        for name, kind in (("reasoning_content", "reasoning"), ("content", "text")):
            if piece.get(name):
                if self._open is None or self._open.kind != kind:
                    yield from self._next(TextItem(self._place, kind))
                yield from self._add(piece[name])

    def finish(self, *, is_whole: bool) -> Iterator[Event]:
        """The end of the last one; there is at least one, a message without text."""
        if self._open is None:
            yield from self._next(TextItem(0, "text"))
        yield from self._close("completed" if is_whole else "incomplete")

    @property
    def message(self) -> Fields:
        """What a later turn goes on from."""
        return self._message

    @property
    def _place(self) -> int:
        return len(self.output) + (self._open is not None)

    def _next(self, item: TextItem | FunctionCallItem) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = item
        yield from item.begin()

    def _add(self, text: str) -> Iterator[Event]:
        if text and self._open is not None:
            yield self._open.push(text)

    def _close(self, status: str) -> Iterator[Event]:
        item, self._open = self._open, None
        if item is None:
            return
        yield from item.end(status)
        self.output.append(item.shown(status))
        text = "".join(item.text)
        if isinstance(item, TextItem):
            name = "content" if item.kind == "text" else "reasoning_content"
            self._message[name] = self._message.get(name, "") + text
        else:
            call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": text}}
            self._message.setdefault("tool_calls", []).append(call)
