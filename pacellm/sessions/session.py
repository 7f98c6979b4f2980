"""One session: its log, and what is kept of the state that follows from it. No torch."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pacellm.kv.blocks import KVTable
from pacellm.kv.history import History
from pacellm.memory.state import BankState
from pacellm.sessions.ending import Ending
from pacellm.sessions.host_state import HostState
from pacellm.sessions.owner import MAX_RANKS, Seen
from pacellm.sessions.turn import Turn
from pacellm.types import SessionStatus

Key = tuple[str, str]
Tier = Literal["device", "host", "disk", "log"]
_HELD = frozenset(("table", "loading", "host", "stub", "stored"))  # what its tier and its bytes depend on
_DATED = frozenset(("ttl", "last_used"))  # what its end depends on


class Observer(Protocol):
    """Is told of what changes in the sessions that it knows."""

    def tier_changed(self, session: Session) -> None:
        """What a session holds, or where, is another."""

    def expiry_changed(self, session: Session) -> None:
        """Its time is another."""


@dataclass(eq=False)
class Session:
    """One session.

    Attributes:
        key: (tenant, id).
        log: turns since creation or the last fold.
        context: the ids that its KV stands for. ending: how its history ends, None where that is not known.
        table, row: its committed KV blocks and bank row, None where dropped or never used.
        origin: host copies of its banks at the last fold, by layer.
        host: KV and banks in host memory.
        stub: the log is on disk only. ``num_tokens`` is the context's length then.
        saved: generation whose log is on disk. ``stored``: tokens of this generation's KV on disk, with
            banks and what lies before.
        generation: commits, resets and imports in its life; ``epoch``: how often it changed servers.
        seen: what ``owner.json`` last said to this server; None where there is none.
        busy: a running request works on it. ``moving``: the worker does. ``loading``: ``table`` is not filled yet.
        wanted: brought back for a request that has not begun.
        status: what the next request finds. ``found``: where its state came from, until a request has said so.
        note: what was refused on the way, until a request has said so.
        kept: created by itself, so it stays without a commit.
        banks: per layer, fill and reads so far, as of the last commit.
        ranks: effective rank of the keys by layer after each of the last commits with banks, ``MAX_RANKS`` at most.
        parent: id of the session that it was forked from, if it was.
        observer: the store that it is in.
    """

    key: Key
    log: list[Turn] = field(default_factory=list)
    context: array[int] = field(default_factory=lambda: array("i"))
    ending: Ending | None = None
    table: KVTable | None = None
    row: int | None = None
    origin: dict[int, BankState] | None = None
    host: HostState | None = None
    stub: bool = False
    num_tokens: int = 0
    saved: int | None = None
    stored: int | None = None
    generation: int = 0
    epoch: int = 1
    seen: Seen | None = None
    busy: bool = False
    moving: bool = False
    loading: bool = False
    wanted: bool = False
    deleted: bool = False
    kept: bool = False
    foreign: bool = False
    status: SessionStatus = "new"
    found: SessionStatus | None = None
    note: str | None = None
    commits: int = 0
    folds: int = 0
    ttl: float | None = None
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    banks: dict[int, dict[str, int]] = field(default_factory=dict)
    ranks: dict[int, list[float]] = field(default_factory=dict)
    parent: str | None = None
    observer: Observer | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if self.observer is None:
            return
        if name in _HELD:
            self.observer.tier_changed(self)
        elif name in _DATED:
            self.observer.expiry_changed(self)

    @property
    def is_resident(self) -> bool:
        """KV, and banks if it has any, are in place."""
        return self.table is not None and not self.loading

    @property
    def history(self) -> History:
        """What has left its window, as far as memory knows of it."""
        held = self.table if self.table is not None else self.host
        return History() if held is None else held.history

    @property
    def maps_files(self) -> bool:
        """Memory has maps of its history's files."""
        return any(block.file is not None for block in self.history.blocks)

    @property
    def kv_tokens(self) -> int:
        """Tokens in its KV blocks: those of its window, all of them where it is within its budget."""
        return len(self.context) - (self.table.view.start if self.table is not None else 0)

    def note_ranks(self, ranks: Mapping[int, float]) -> None:
        """Effective ranks by layer, after a commit."""
        noted = {layer: [*self.ranks.get(layer, ()), round(rank, 3)] for layer, rank in ranks.items()}
        self.ranks = {layer: found[-MAX_RANKS:] for layer, found in noted.items()}

    @property
    def in_use(self) -> bool:
        """A request or the worker needs it as it is."""
        return self.busy or self.moving or self.wanted

    @property
    def log_tokens(self) -> int:
        """Tokens fed since creation or the last fold."""
        return sum(len(turn.ids) for turn in self.log)

    @property
    def log_bytes(self) -> int:
        """Bytes of the log in memory."""
        return sum(turn.ids.itemsize * len(turn.ids) for turn in self.log)

    @property
    def tier(self) -> Tier:
        """The highest tier that has its state; ``log`` where only a replay brings it back."""
        if self.is_resident:
            return "device"
        if self.host is not None:
            return "host"
        return "disk" if self.stub or self.stored is not None else "log"

    @property
    def expires(self) -> float | None:
        """When it goes unless it is used before; None where it has no such time."""
        return None if self.ttl is None else self.last_used + self.ttl
