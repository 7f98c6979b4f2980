"""What a stored response was made of, as a list of items in pages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

from pacellm.errors import RequestError

from ...response_store import Message, Transcript

Item = dict[str, Any]
_INPUT = ("system", "developer", "user")


def input_items(transcript: Transcript) -> list[Item]:
    """All that a response was made of: what its conversation had said before, and its own input, without instructions.

    An item has the same id in every list. Those of earlier answers have the ids that these answers gave them.
    """
    return [item for turn in _turns(transcript) for item in turn]


def page(items: list[Item], *, limit: int, after: str | None, order: Literal["asc", "desc"]) -> dict[str, Any]:
    """A part of a list, as OpenAI shows it.

    Args:
        items: the first one first.
        limit: items of a page.
        after: id of the item before the page's first; None begins.

    Raises:
        RequestError: no item has this id.
    """
    ordered = items if order == "asc" else items[::-1]
    places = [-1] if after is None else [place for place, item in enumerate(ordered) if item["id"] == after]
    if not places:
        raise RequestError("after: there is no such item in this list", param="after", code="invalid_value")
    start = places[0] + 1
    data = ordered[start : start + limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(ordered) > start + limit}


def _turns(last: Transcript) -> list[list[Item]]:
    """Items by turn, without the last one's answer."""
    nodes: list[Transcript] = []
    node: Transcript | None = last
    while node is not None:
        nodes.append(node)
        node = node.parent
    digest = hashlib.sha256(last.scope.encode())
    return [_Turn(node, digest, has_answer=node is not last).items for node in reversed(nodes)]


class _Turn:
    """One turn's items.

    Args:
        digest: of all that was said before; goes on with this turn.
        has_answer: whether its answer is one of them.
    """

    def __init__(self, node: Transcript, digest: hashlib._Hash, *, has_answer: bool) -> None:
        self._digest, self._given = digest, list(node.item_ids)
        self.items = [item for message in node.messages[:-1] for item in self._of(message, is_answer=False)]
        if has_answer:
            self.items += self._of(node.messages[-1], is_answer=True)

    def _of(self, message: Message, *, is_answer: bool) -> Iterator[Item]:
        def item(prefix: str, kind: str, text: str, **fields: Any) -> Item:
            self._digest.update(f"{prefix}/{len(text)}/{text}".encode("utf-8", "surrogatepass"))
            given = next((one for one in self._given if is_answer and one.startswith(f"{prefix}_")), None)
            if given is not None:
                self._given.remove(given)
            made = f"{prefix}_{self._digest.hexdigest()[:32]}"
            return {"id": given or made, "type": kind, "status": "completed", **fields}

        role, content = message["role"], message["content"]
        if role in _INPUT:
            yield item("msg", "message", content, role=role, content=[{"type": "input_text", "text": content}])
            return
        if role == "tool":
            call_id = message["tool_call_id"]
            yield item("fco", "function_call_output", content, call_id=call_id, output=content)
            return
        if thought := message.get("reasoning_content"):
            yield item("rs", "reasoning", thought, summary=[], content=[{"type": "reasoning_text", "text": thought}])
        calls = message.get("tool_calls", ())
        if content or not (thought or calls):
            part = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
            yield item("msg", "message", content, role=role, content=[part])
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            yield item("fc", "function_call", arguments, call_id=call["id"], name=name, arguments=arguments)
