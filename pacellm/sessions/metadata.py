"""What a client may know of its session; nothing of its content."""

from __future__ import annotations

from typing import Any

from pacellm.memory.pool import BankPool
from pacellm.memory.reads import rates
from pacellm.sessions.disk_usage import DiskUsage
from pacellm.sessions.session import Session


class SessionMetadata:
    """Shows sessions.

    Args:
        pool: of banks; None without PA.
        usage: of the session directory; None where there is none.
        block_bytes: KV bytes of one block over all layers.
        slots: of a bank.
    """

    def __init__(self, pool: BankPool | None, usage: DiskUsage | None = None, *, block_bytes: int, slots: int) -> None:
        self._pool, self._usage, self.block_bytes, self._slots = pool, usage, block_bytes, slots

    def of(self, session: Session, *, ranks: bool = True) -> dict[str, Any]:
        """One session, as the API shows it; with effective ranks turn by turn, or the last ones alone."""
        return {
            "id": session.key[1],
            "object": "session",
            "forked_from": session.parent,
            "created": int(session.created),
            "last_used": int(session.last_used),
            "expires": None if session.expires is None else int(session.expires),
            "ttl": session.ttl,
            "tokens": session.num_tokens if session.stub else len(session.context),
            "commits": session.commits,
            "generation": session.generation,
            "tier": session.tier,
            "in_use": session.busy,
            "bytes": {
                "kv": len(session.table.blocks) * self.block_bytes if session.table is not None else 0,
                "bank": self.bank_bytes(session),
                "host": session.host.nbytes if session.host is not None else 0,
                "history": session.history.host_bytes,
                "log": session.log_bytes,
                "disk": 0 if self._usage is None else self._usage.of_session(session.key),
            },
            "bank": {"slots": self._slots, "layers": _by_layer(session, ranks)} if self._pool is not None else None,
        }

    def bank_bytes(self, session: Session) -> int:
        """Bytes of banks that it holds on the device."""
        return self._pool.bytes_per_row if self._pool is not None and session.row is not None else 0


def _by_layer(session: Session, with_ranks: bool) -> dict[str, dict[str, Any]]:
    """Fill and lifetime reads per layer, with the rates of their outcomes and the keys' effective rank."""
    shown: dict[str, dict[str, Any]] = {}
    for layer, facts in session.banks.items():
        ranks = session.ranks.get(layer, [])
        shown[str(layer)] = {**facts, **rates(facts), "effective_rank": ranks[-1] if ranks else None}
        if with_ranks:
            shown[str(layer)]["ranks"] = ranks
    return shown
