"""Failures outside the forward pass: each is counted, logged and survived. No torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

logger = logging.getLogger("pacellm.engine")
Place = Literal["operation", "delivery", "worker", "expiry", "inbox", "admission", "commit", "step", "shutdown"]
PLACES: tuple[Place, ...] = get_args(Place)


class Faults:
    """What failed and ended nothing but itself, by the place where it was caught; any thread may tell.

    Attributes:
        counts: failures so far.
    """

    def __init__(self) -> None:
        self.counts: Counter[Place] = Counter()

    def note(self, place: Place, error: BaseException) -> None:
        """Count and log one."""
        self.counts[place] += 1
        logger.error("a failure in %s was survived: %s: %s", place, type(error).__name__, error, exc_info=error)

    @contextmanager
    def survived(self, place: Place) -> Iterator[None]:
        """What the block raises ends the block alone."""
        try:
            yield
        except Exception as error:
            self.note(place, error)


def settle(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> bool:
    """Give a future its result or error. False where whoever asked has given up: then nobody hears it."""
    with suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
        return True
    return False
