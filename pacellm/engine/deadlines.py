"""Requests that would miss their deadlines are refused before they take from those that make theirs. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from pacellm.config import EngineConfig
from pacellm.engine.admission_plan import AdmissionPlanner
from pacellm.engine.forecast import Forecast, Load, PromptSpan
from pacellm.engine.pace import Pace
from pacellm.engine.queues import RequestQueues
from pacellm.engine.sequence import Sequence
from pacellm.errors import DeadlineExceeded, Overloaded, PaceError
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore


class Deadlines:
    """Forecasts for requests, and what follows from them.

    Args:
        config: resolved.
        queues, sessions: looked at, not changed.
        planner: tells what is to be fed of a prompt.
        pace: what steps cost.
        clock: seconds, as requests' arrival and deadline are told.
    """

    def __init__(
        self,
        config: EngineConfig,
        queues: RequestQueues,
        sessions: SessionStore,
        planner: AdmissionPlanner,
        pace: Pace,
        clock: Callable[[], float],
    ) -> None:
        self._config, self._queues, self._sessions, self._planner = config, queues, sessions, planner
        self._pace, self._clock = pace, clock
        self.forecast = Forecast(config)

    def check(self, sequence: Sequence) -> None:
        """Refuse what would miss its deadline behind the requests that are there, before it is queued.

        Raises:
            Overloaded: it could be answered in time later. DeadlineExceeded: not even alone.
        """
        queues, request = self._queues, sequence.request
        if request.deadline is None or not (queues.running or queues.waiting):
            return
        ahead = [self._queued(other) for other in queues.waiting if other.request.priority <= request.priority]
        own = self._queued(sequence)
        sequence.forecast = needed = self._seconds(sequence, own, ahead)
        left = request.deadline - self._clock()
        if needed is None or needed <= left:
            return
        alone = self.forecast.seconds(self._pace, own, sequence.max_tokens, Load())
        if alone is not None and alone > left:
            raise DeadlineExceeded(
                f"an answer takes about {alone:.1f} s even with nothing beside it, and the request's deadline leaves "
                f"{left:.1f} s"
            )
        raise Overloaded(
            f"an answer would take about {needed:.1f} s at the moment, and the request's deadline leaves {left:.1f} s; "
            "try again later",
            retry_after=max(1, math.ceil(needed - left)), code="deadline_out_of_reach",
        )  # fmt: skip

    def missed(self, sequence: Sequence, session: Session | None) -> PaceError | None:
        """The error of a request whose turn it is, and whose answer would come after its deadline; None where it would
        not, or where nobody else would use what it takes."""
        deadline = sequence.request.deadline
        if deadline is None or not self._queues.running:
            return None
        needed = self._seconds(sequence, self._due(sequence, session), [])
        if needed is None or self._clock() + needed <= deadline:
            return None
        return DeadlineExceeded("the request's deadline passes before it can be answered")

    def is_late(self, sequence: Sequence) -> bool:
        """The answer of a running request would miss its deadline even if its prompt were read next."""
        deadline = sequence.request.deadline
        if deadline is None:
            return False
        own, load = (sequence.position, sequence.pending), Load(decodes=len(self._queues.running) - 1)
        needed = self.forecast.seconds(self._pace, own, sequence.max_tokens, load)
        return needed is not None and self._clock() + needed > deadline

    def answered(self, sequence: Sequence) -> None:
        """A request is complete."""
        self.forecast.observe_answer(len(sequence.generated))
        self.forecast.observe(sequence.forecast, self._age(sequence), is_over=True)

    def given_up(self, sequence: Sequence) -> None:
        """A request is taken out before its end."""
        self.forecast.observe_answer(len(sequence.generated), is_over=False)
        self.forecast.observe(sequence.forecast, self._age(sequence), is_over=False)

    def _age(self, sequence: Sequence) -> float:
        return self._clock() - sequence.request.arrival

    def _seconds(self, sequence: Sequence, own: PromptSpan, ahead: list[PromptSpan]) -> float | None:
        """Until a request would be answered, behind what runs and ``ahead``."""
        queues, priority = self._queues, sequence.request.priority
        prompts = [other for other in queues.running if not other.is_decoding]
        before = [
            (other.position, other.pending)
            for other in prompts
            if other.request.priority <= priority and not self.is_late(other)
        ]
        seats = max(0, self._config.max_num_seqs - queues.seats)
        load = Load([*before, *ahead], len(queues.running) - len(prompts), seats, len(ahead))
        return self.forecast.seconds(self._pace, own, sequence.max_tokens, load)

    def _queued(self, sequence: Sequence) -> PromptSpan:
        """What is due of a request that waits, looked at once: it walks the prompt."""
        if sequence.due is None:
            sequence.due = self._due(sequence, self._sessions.get(sequence.request.session))
        return sequence.due

    def _due(self, sequence: Sequence, session: Session | None) -> PromptSpan:
        """What is to be fed of a prompt, as far as that is known before its turn."""
        request, known = sequence.request, 0
        if session is not None:
            known = session.num_tokens or len(session.context)
        if request.append is not None:
            return known, len(request.prompt)
        if session is not None and not session.is_resident:  # it will have come back by then
            start = min(known, len(request.prompt) - 1)
            return start, len(request.prompt) - start
        plan = self._planner.plan(sequence, session)
        return plan.position, sum(len(turn.ids) for turn in plan.work) - plan.cursor
