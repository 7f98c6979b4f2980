"""What a replica reports: the sessions that would have to be moved if another one were asked."""

from __future__ import annotations

from deploy.ray.table import MAX_REPORTED, digest
from pacellm.sessions.store import SessionStore


def held_sessions(store: SessionStore) -> list[tuple[int, int]]:
    """(digest, generation) of the sessions with anything in this process's memory, most recently used first; those that
    are on disk alone are everybody's."""
    held = [session for session in store if not session.stub and (session.commits or session.kept or session.busy)]
    return [(digest(*session.key), session.generation) for session in reversed(held[-MAX_REPORTED:])]
