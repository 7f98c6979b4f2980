"""What stored responses and conversations have said so far, so that a client sends only what is new."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Key = tuple[str, str]
_TOMBSTONES = 65536
_LOOK_SECONDS = 60.0
_OVERHEAD = 512  # bytes of an entry beside its texts
_ID = 96  # bytes of an item's id


@dataclass(eq=False)
class Transcript:
    """Messages of a conversation up to one answer: its own turn's, behind those of the transcript it goes on from.

    Attributes:
        messages: of this turn, the answer included.
        parent: what it goes on from.
        scope: of the tokenizer's memory; the same along a conversation.
        num_bytes, total_bytes: of its own messages, and of all.
        users: kept entries and later transcripts that need it.
        item_ids: of the items that the answer came as.
    """

    messages: tuple[Message, ...]
    parent: Transcript | None
    scope: str
    item_ids: tuple[str, ...] = ()
    num_bytes: int = field(init=False)
    total_bytes: int = field(init=False)
    users: int = 0

    def __post_init__(self) -> None:
        self.num_bytes = _OVERHEAD + sum(_size(one) for one in self.messages) + _ID * len(self.item_ids)
        self.total_bytes = self.num_bytes + (0 if self.parent is None else self.parent.total_bytes)

    def all(self) -> list[Message]:
        """Every message, the first one first."""
        turns: list[tuple[Message, ...]] = []
        node: Transcript | None = self
        while node is not None:
            turns.append(node.messages)
            node = node.parent
        return [message for messages in reversed(turns) for message in messages]


def _size(message: Message) -> int:
    texts = [message["content"], message.get("reasoning_content")]
    texts += [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    return _OVERHEAD * len(texts) + sum(sys.getsizeof(text) for text in texts)


@dataclass(eq=False)
class StoredResponse:
    """A stored response, or a conversation as it stands.

    Attributes:
        answer: the response as JSON, None for a conversation.
        at: when it was stored, monotonic seconds.
        items: ids of the response's output items.
    """

    transcript: Transcript
    answer: bytes | None
    at: float
    items: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Its own bytes, without the transcript's."""
        return _OVERHEAD * (1 + len(self.items)) + len(self.answer or b"")


class ResponseStore:
    """Entries by tenant and name, within a byte budget and a time to live. Used on the event loop alone.

    Beyond the budget go the entries of the tenant that holds most, least recently used first. Turns that entries share
    are kept, and counted, once.

    Args:
        max_bytes: of all entries.
        ttl: seconds that an entry lives.
        dropped: told the key of each response that goes.
        forgotten: told the scope of each conversation of which nothing is left.
    """

    def __init__(
        self, max_bytes: int, ttl: float, dropped: Callable[[Key], None], forgotten: Callable[[str], None]
    ) -> None:
        self._max_bytes, self._ttl = max_bytes, ttl
        self._dropped, self._forgotten = dropped, forgotten
        self._entries: dict[str, OrderedDict[str, StoredResponse]] = {}  # by tenant, least recently used first
        self._bytes: Counter[str] = Counter()
        self._next_look = 0.0
        self._lost: OrderedDict[Key, None] = OrderedDict()
        self._responses: dict[Key, str] = {}  # by tenant and item's id, which response it is of

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return self._bytes.total()

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def count(self, tenant: str) -> int:
        """How many entries a tenant has."""
        return len(self._entries.get(tenant, ()))

    def get(self, key: Key) -> StoredResponse | None:
        """An entry that is there, now the one used last."""
        entry = self._entries.get(key[0], OrderedDict()).get(key[1])
        if entry is not None and entry.at < time.monotonic() - self._ttl:
            self._lose(key)
            return None
        if entry is not None:
            self._entries[key[0]].move_to_end(key[1])
        return entry

    def item(self, tenant: str, item_id: str) -> dict[str, Any] | None:
        """An output item of a stored response."""
        name = self._responses.get((tenant, item_id))
        entry = None if name is None else self.get((tenant, name))
        if entry is None or entry.answer is None:
            return None
        output: list[dict[str, Any]] = json.loads(entry.answer)["output"]
        return next(one for one in output if one["id"] == item_id)

    def was_dropped(self, key: Key) -> bool:
        """There was an entry, and it gave way."""
        return key in self._lost

    def put(self, key: Key, transcript: Transcript, answer: bytes | None = None, items: Sequence[str] = ()) -> None:
        """Keep an entry; one of the same name is replaced.

        Args:
            answer, items: of a response, as :class:`StoredResponse` has them.
        """
        tenant, name = key
        entry = StoredResponse(transcript, answer, time.monotonic(), tuple(items))
        self._hold(tenant, transcript)
        self._remove(key)
        self._responses |= {(tenant, item): name for item in items}
        self._entries.setdefault(tenant, OrderedDict())[name] = entry
        self._bytes[tenant] += entry.num_bytes
        self._lost.pop(key, None)
        self._expire()
        while self.num_bytes > self._max_bytes and self._entries:
            largest = max(self._entries, key=lambda one: self._bytes[one])
            self._lose((largest, next(iter(self._entries[largest]))))

    def drop(self, key: Key) -> bool:
        """Forget an entry on request; False where there was none."""
        self._lost.pop(key, None)
        return self._remove(key) is not None

    def drop_all(self, tenant: str) -> None:
        """Forget everything of a tenant."""
        for name in list(self._entries.get(tenant, ())):
            self._remove((tenant, name))
        for key in [key for key in self._lost if key[0] == tenant]:
            del self._lost[key]

    def copy(self, key: Key, target: Key) -> None:
        """Let a conversation begin where an entry stands, if there is one."""
        entry = self.get(key)
        if entry is not None:
            self.put(target, entry.transcript)

    def _expire(self) -> None:
        """Look for those whose time has come, once a minute."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look, limit = now + _LOOK_SECONDS, now - self._ttl
        for tenant, entries in list(self._entries.items()):
            for name in [name for name, entry in entries.items() if entry.at < limit]:
                self._lose((tenant, name))

    def _lose(self, key: Key) -> None:
        """An entry gives way."""
        entry = self._remove(key)
        self._lost[key] = None
        while len(self._lost) > _TOMBSTONES:
            self._lost.popitem(last=False)
        if entry is not None and entry.answer is not None:
            self._dropped(key)

    def _remove(self, key: Key) -> StoredResponse | None:
        tenant, name = key
        entry = self._entries.get(tenant, OrderedDict()).pop(name, None)
        if entry is not None:
            self._bytes[tenant] -= entry.num_bytes
            for item in entry.items:
                self._responses.pop((tenant, item), None)
            self._release(tenant, entry.transcript)
            if not self._entries[tenant]:
                del self._entries[tenant]
        return entry

    def _hold(self, tenant: str, transcript: Transcript) -> None:
        node: Transcript | None = transcript
        while node is not None:
            node.users += 1
            if node.users > 1:
                return
            self._bytes[tenant] += node.num_bytes
            node = node.parent

    def _release(self, tenant: str, transcript: Transcript) -> None:
        node: Transcript | None = transcript
        while node is not None:
            node.users -= 1
            if node.users:
                return
            self._bytes[tenant] -= node.num_bytes
            if node.parent is None:
                self._forgotten(node.scope)
            node = node.parent
