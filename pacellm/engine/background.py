"""What an engine does between steps, beside running requests."""

from __future__ import annotations

from pacellm.faults import Faults
from pacellm.sessions.files import SessionFiles
from pacellm.sessions.operation_queue import OperationQueue
from pacellm.sessions.operations import SessionOperations
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker


class Background:
    """Takes the worker's results, ends sessions whose time has come, tidies the directory, runs operations.

    Args:
        worker, sessions, files: looked after; files is None without a session directory.
        session_operations: end sessions. operations: of clients, that wait.
        faults: where failures are counted.
    """

    def __init__(
        self,
        worker: Worker,
        sessions: SessionStore,
        files: SessionFiles | None,
        session_operations: SessionOperations,
        operations: OperationQueue,
        faults: Faults,
    ) -> None:
        self._worker, self._sessions, self._files = worker, sessions, files
        self._session_operations, self._operations, self._faults = session_operations, operations, faults

    def run(self) -> None:
        """All that is due."""
        self._worker.poll()
        for session in self._sessions.expired():
            with self._faults.survived("expiry"):
                self._session_operations.expire(session)
        if self._files is not None:
            self._files.tidy()
        self._operations.run()
