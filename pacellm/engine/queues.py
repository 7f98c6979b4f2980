"""Where requests are: waiting, running, or complete and not yet on disk. No torch."""

from __future__ import annotations

from collections import deque

from pacellm.engine.sequence import Sequence
from pacellm.errors import PaceError


class RequestQueues:
    """All sequences of an engine.

    Attributes:
        waiting: in the order in which they begin.
        running: oldest first.
        finishing: complete, but their commit is not yet on disk.
        admitted, refused: since they were last taken.
    """

    def __init__(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.finishing: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.refused: list[tuple[Sequence, PaceError]] = []

    @property
    def seats(self) -> int:
        """Working rows that are used or promised: those of choices that go on after the prompt are."""
        promised = sum(sequence.num_branches for sequence in self.running)
        return len(self.running) + len(self.finishing) + promised

    def enqueue(self, sequence: Sequence) -> None:
        """Queue a request behind those of its priority, those of its own session and the choices of running requests,
        which hold on to their memory until their choices end."""
        own, place = sequence.request, len(self.waiting)
        while place:
            other = self.waiting[place - 1]
            before = other.request
            is_own = own.session is not None and before.session == own.session
            if other.is_branch or is_own or before.priority <= own.priority:
                break
            place -= 1
        self.waiting.insert(place, sequence)

    def is_behind(self, sequence: Sequence) -> bool:
        """An earlier request of the same session is still waiting."""
        for other in self.waiting:
            if other is sequence:
                return False
            if other.request.session == sequence.request.session and not other.is_branch:
                return True
        return False

    def take_admitted(self) -> list[Sequence]:
        """Those that began since this was last asked."""
        admitted, self.admitted = self.admitted, []
        return admitted

    def take_refused(self) -> list[tuple[Sequence, PaceError]]:
        """Those that were refused when their turn came, and why."""
        refused, self.refused = self.refused, []
        return refused
