"""Which prompts a step reads, and how much of each. No torch.

Prompts are read one after another, those that have waited longest first: read side by side they would all end late,
and under load miss their deadlines together. What is much shorter than the one whose turn it is overtakes it, on at
most half of every step, so neither waits for the other. Priorities go before that, and what can no longer end before
its deadline goes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pacellm.engine.pace import Pace
from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Step, Work
from pacellm.rows import ROWS

_MUCH = 4  # times shorter: such a prompt overtakes
SHARE = 0.5
"""Of a step, for prompts that overtake."""

_MAX_SCORED = 256  # rows of logits that one request may ask of a step


def add_chunks(
    step: Step,
    prompts: Iterable[Sequence],
    budget: int,
    seconds: float | None,
    pace: Pace,
    is_late: Callable[[Sequence], bool],
) -> None:
    """Add chunks of ``prompts`` to a step.

    Args:
        budget: tokens that there is room for.
        seconds: that they may take; None is no limit, 0 none.
        is_late: its answer would miss its deadline even if it were read next.
    """
    prompts = list(prompts)
    if seconds == 0.0 or not prompts:
        return
    quick, others = _turns(prompts, is_late)
    left = _TokenBudget(step, budget, seconds, pace)
    if quick:
        first = others[0]
        kept = None if seconds is None else (1 - SHARE) * seconds
        left.fill(quick, int((1 - SHARE) * min(budget, 2 * first.pending)), kept)
    left.fill(others, 0, None if seconds is None else 0.0)


def overtakes(tokens: int, first: int) -> bool:
    """A prompt of so many tokens does not wait for the one whose turn it is."""
    return _MUCH * tokens <= first


def _turns(prompts: list[Sequence], is_late: Callable[[Sequence], bool]) -> tuple[list[Sequence], list[Sequence]]:
    """Of one or more: those that overtake, the shortest first, and the others in turn."""
    ranks = {one.id: (is_late(one), one.request.priority) for one in prompts}
    in_turn = sorted(prompts, key=lambda one: (ranks[one.id], one.request.arrival))
    first = in_turn[0]
    quick = [one for one in in_turn if ranks[one.id] == ranks[first.id] and overtakes(one.pending, first.pending)]
    return sorted(quick, key=lambda one: one.pending), [one for one in in_turn if one not in quick]


@dataclass
class _TokenBudget:
    """What is left of a step for prompts."""

    step: Step
    budget: int
    seconds: float | None
    pace: Pace

    def fill(self, prompts: list[Sequence], kept: int, kept_seconds: float | None) -> None:
        """Chunks of ``prompts`` in their order, as long as more is left than what is kept for others.

        The first one gets its smallest chunk even where that takes longer than a step may: once enough steps have gone
        without it.
        """
        for number, sequence in enumerate(prompts):
            count = min(self.budget - kept, _most(sequence))
            if count <= 0:
                return
            if self.seconds is not None and kept_seconds is not None:
                left = self.seconds - kept_seconds
                count = self._fitting(sequence.place, count, left)
                price = self.pace.cost(sequence.place, count)
                if not self._affords(price, left, is_first=number == 0):
                    if number == 0:
                        self.pace.save(left)
                        self.seconds = kept_seconds
                    return
                self.seconds -= min(price, left)
            self.step.work.append(Work(sequence, count))
            self.budget -= count

    def _fitting(self, position: int, count: int, left: float) -> int:
        """As many of ``count`` tokens as take ``left`` seconds, but at least one product's rows."""
        fitting = self.pace.fitting(position, left)
        return count if fitting is None else min(count, max(fitting, ROWS))

    def _affords(self, price: float, left: float, *, is_first: bool) -> bool:
        return price <= left or not self.step.work or (is_first and self.pace.afford(price, left))


def _most(sequence: Sequence) -> int:
    """Tokens that it could be fed at once."""
    left = sequence.horizon - sequence.position
    return left if sequence.request.sampling.prompt_logprobs is None else min(left, _MAX_SCORED)
