"""Finding the session that an operation is about, in memory and in the session directory."""

from __future__ import annotations

from collections.abc import Callable

from pacellm.errors import PaceError, SessionExists, SessionNotFound
from pacellm.sessions.claims import DirectoryClaims
from pacellm.sessions.session import Key, Session
from pacellm.sessions.store import SessionStore


class SessionLookup:
    """Finds sessions for operations, which are called again while the disk takes its time.

    Args:
        store: the sessions in memory.
        claims: ask the session directory.
        has_directory: there is one.
    """

    def __init__(self, store: SessionStore, claims: DirectoryClaims, *, has_directory: bool) -> None:
        self._store, self._claims, self._has_directory = store, claims, has_directory

    def finder(self, key: Key) -> Callable[[], Session | None]:
        """Finds a session, after the disk was asked once; None while that takes its time.

        Raises (when called):
            SessionNotFound: there is none, or it is another tenant's. PaceError: the disk cannot tell.
        """
        asked = not self._has_directory
        refused: list[PaceError] = []

        def find() -> Session | None:
            nonlocal asked
            if refused:
                raise refused[0]
            session = self._store.get(key)
            if not asked and (session is None or not session.busy):
                asked = True
                self._claims.ask(key, refuse=refused.append)
            if self._claims.is_asking(key):
                return None
            session = self._store.get(key)
            if session is not None and session.stub:
                self._claims.ask(key, refuse=refused.append)
                return None
            if session is None or not (session.commits or session.kept):
                raise SessionNotFound(f"no session {key[1]!r}", param="session_id")
            return session

        return find

    def absence(self, key: Key) -> Callable[[], bool]:
        """True once it is certain that a session is not there.

        Raises (when called):
            SessionExists: it is.
        """
        find = self.finder(key)

        def absent() -> bool:
            session = self._store.get(key)
            if session is not None and session.busy:
                raise SessionExists(f"session {key[1]!r} exists", param="session_id")
            try:
                if find() is None:
                    return False
            except SessionNotFound:
                return True
            raise SessionExists(f"session {key[1]!r} exists", param="session_id")

        return absent
