"""That memory adds up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pacellm.errors import EngineError
from pacellm.kv.blocks import BLOCK, KVTable

if TYPE_CHECKING:
    from pacellm.engine.engine import Engine


class IntegrityError(EngineError):
    """Something leaked, is held twice or is about to be overwritten."""


def check_integrity(engine: Engine) -> None:
    """Blocks and rows add up: everything that is held is held by a running request or a session, and no running
    request writes where somebody else's KV lies.

    Raises:
        IntegrityError: they do not.
    """
    held: dict[int, int] = {}
    working = [*engine.scheduler.running, *engine.scheduler.finishing]
    tables = [sequence.table for sequence in working] + engine.sessions.tables()
    tables += engine.scheduler.progress.tables()
    for table in tables:
        for block in table.blocks:
            held[block] = held.get(block, 0) + 1
    wrong = [block for block in range(engine.num_blocks) if engine.allocator.references(block) != held.get(block, 0)]
    if wrong or engine.allocator.num_free != engine.num_blocks - len(held):
        raise IntegrityError(f"KV blocks do not add up: {wrong[:8]}")
    if engine.pool is not None:
        rows = [sequence.row for sequence in working] + engine.sessions.rows()
        rows += engine.scheduler.progress.rows()
        if len(set(rows)) != len(rows) or engine.pool.num_free != engine.pool.num_rows - len(rows):
            raise IntegrityError("bank rows do not add up")
    _check_writes(engine)


def _check_writes(engine: Engine) -> None:
    held: dict[int, list[tuple[object, int]]] = {}  # who holds a block, and up to which position it is theirs
    holders: list[tuple[object, KVTable, int]] = [
        (entry, entry.table, entry.position) for entry in engine.scheduler.progress
    ]
    holders += [(s, s.table, len(s.context)) for s in engine.sessions if s.table is not None and not s.loading]
    holders += [(s, s.table, s.position) for s in engine.scheduler.running]
    for holder, table, end in holders:
        for number, block in enumerate(table.blocks):
            held.setdefault(block, []).append((holder, min(end, (number + 1) * BLOCK)))
    for sequence in engine.scheduler.running:
        for block in sequence.table.blocks[sequence.position // BLOCK :]:
            if any(holder is not sequence and end > sequence.position for holder, end in held[block]):
                raise IntegrityError(f"request {sequence.id} would overwrite KV block {block}, which is not its own")
