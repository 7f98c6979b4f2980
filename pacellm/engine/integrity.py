"""That memory adds up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pacellm.errors import EngineError

if TYPE_CHECKING:
    from pacellm.engine.engine import Engine


def check_integrity(engine: Engine) -> None:
    """Blocks and rows add up: everything that is held is held by a running request or a session.

    Raises:
        EngineError: something leaked or is held twice.
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
        raise EngineError(f"KV blocks do not add up: {wrong[:8]}")
    if engine.pool is not None:
        rows = [sequence.row for sequence in working] + engine.sessions.rows()
        rows += engine.scheduler.progress.rows()
        if len(set(rows)) != len(rows) or engine.pool.num_free != engine.pool.num_rows - len(rows):
            raise EngineError("bank rows do not add up")
