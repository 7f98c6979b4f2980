"""Operations that the engine thread runs between steps, and the futures of those who asked.

An operation is a function that is called until it returns something else than ``WAIT``; until then it waits for the
worker or for a session's running request. What it returns may be a future itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pacellm.errors import EngineError, PaceError, reason
from pacellm.faults import Faults, settle

Operation = Callable[[], Any]
WAIT = object()  # returned by an operation that must be called again


class OperationQueue:
    """Operations that have not ended.

    Args:
        faults: where failures are noted that are no refusals.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._waiting: list[tuple[Operation, Future[Any]]] = []

    @property
    def is_waiting(self) -> bool:
        """An operation has not ended."""
        return bool(self._waiting)

    def submit(self, operation: Operation, future: Future[Any] | None = None) -> Future[Any]:
        """Run an operation at the next step, and again until it ends."""
        future = future or Future()
        self._waiting.append((operation, future))
        return future

    def run(self) -> None:
        """Call every waiting operation once; one whose asker has given up is forgotten."""
        waiting, self._waiting = self._waiting, []
        for operation, future in waiting:
            if future.cancelled():
                continue
            try:
                result = operation()
            except PaceError as error:
                settle(future, error=error)
            except Exception as error:
                self._faults.note("operation", error)
                settle(future, error=EngineError(f"the operation failed: {reason(error)}"))
            else:
                self._take(result, operation, future)

    def _take(self, result: Any, operation: Operation, future: Future[Any]) -> None:
        if result is WAIT:
            self._waiting.append((operation, future))
        elif isinstance(result, Future):
            result.add_done_callback(lambda done: pass_on(done, future, lambda found: found))
        else:
            settle(future, result)

    def end(self, error: PaceError) -> None:
        """The engine has ended: nobody waits in silence."""
        for _, future in self._waiting:
            settle(future, error=error)
        self._waiting = []


def pass_on(done: Future[Any], target: Future[Any], make: Callable[[Any], Any]) -> None:
    """Give ``target`` what ``make`` makes of a result, or the error."""
    try:
        settle(target, make(done.result()))
    except PaceError as error:
        settle(target, error=error)
    except Exception as error:
        settle(target, error=EngineError(f"the session directory failed: {reason(error)}"))
