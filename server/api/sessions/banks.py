"""A session's bank as the API shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pacellm.config import PAConfig
from pacellm.memory.bank_map import map_bank
from pacellm.memory.state import BankState
from pacellm.sessions.turn import Turn
from pacellm.sessions.writers import Write, writes_of

MAX_SLOTS = 256
MAX_TOKENS = 256  # that are told of each write
Found = tuple[BankState, Sequence[Turn], int]
_NOTHING: dict[str, Any] = {
    "filled": 0, "writes": 0, "effective_rank": 0.0, "cosines": [], "usage": [], "age": [], "stamp": [], "writers": [],
}  # fmt: skip


def bank_of(
    name: str, layer: int, found: Found | None, start: int, config: PAConfig, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """At most ``MAX_SLOTS`` slots of a bank from ``start`` on.

    Args:
        found: what the engine's operation gave.
        config: of the banks.
        decode: ids to text.
    """
    told = {
        "id": name,
        "object": "session.bank",
        "layer": layer,
        "slots": config.bank_size,
        "segment": config.segment,
        "start": start,
    }
    if found is None:
        return {**told, **_NOTHING}
    bank, log, clock = found
    shown = map_bank(bank, start, MAX_SLOTS)
    stamps = shown.stamp.tolist()
    writes = writes_of(log, clock, stamps, config.segment, most=MAX_TOKENS)
    return {
        **told,
        "filled": shown.filled,
        "writes": shown.clock,
        "effective_rank": round(shown.rank, 3),
        "cosines": shown.cosines.tolist(),
        "usage": shown.usage.tolist(),
        "age": [shown.clock - stamp for stamp in stamps],
        "stamp": stamps,
        "writers": [_writer(writes[stamp], decode) for stamp in sorted(writes)],
    }


def _writer(one: Write, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    return {
        "stamp": one.stamp,
        "turn": one.turn,
        "start": one.start,
        "end": one.end,
        "decoded": one.decoded,
        "text": decode(list(one.ids)),
        "left_out": one.end - one.start - len(one.ids),
    }
