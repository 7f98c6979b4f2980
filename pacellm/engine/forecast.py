"""When a request would be answered, by what steps and answers have been like of late. No torch.

A forecast is good enough to refuse what would miss its deadline anyway, before it takes anything from those that make
theirs. It is held against what really happened, so that what it leaves out is learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pacellm.config import EngineConfig
from pacellm.engine import chunked_prefill
from pacellm.engine.pace import SHARE, Pace

PromptSpan = tuple[int, int]
"""Prompt tokens to feed: (position of the first, how many)."""

_KEPT = 0.8  # of an estimate, at each observation
_MARGIN = 1.2  # for what others do meanwhile: a late answer costs more than a refusal
_MOST = 4.0  # times: what experience may make of a forecast


@dataclass(frozen=True)
class Load:
    """What a request finds.

    Attributes:
        prompts: to be read before its own.
        decodes: streams that decode.
        seats: requests that may still begin at once.
        waiting: requests that begin before it.
    """

    prompts: Iterable[PromptSpan] = ()
    decodes: int = 0
    seats: int = 1
    waiting: int = 0


class Forecast:
    """Seconds until an answer is complete.

    Args:
        config: resolved.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._seats, self._mixed = config.max_num_seqs, config.max_num_mixed_tokens
        self._answer, self._deviation = 0.0, 0.0  # tokens of an answer: their mean, and how far others are from it
        self._has_seen = False
        self._factor = 1.0

    def seconds(self, pace: Pace, own: PromptSpan, max_tokens: int, load: Load) -> float | None:
        """Until a request of ``own`` prompt tokens is answered; None where too little is known."""
        each = pace.cost(0)
        if not each or pace.decode is None:
            return None
        ahead = list(load.prompts)
        cost, tokens = _work(pace, [*ahead, own])
        like = [span for span in ahead if not chunked_prefill.overtakes(own[1], span[1])]
        alone, few = _work(pace, [*like, own])
        if alone / chunked_prefill.SHARE < cost:
            cost, tokens = alone / chunked_prefill.SHARE, few / chunked_prefill.SHARE
        is_shared = bool(load.decodes or ahead)
        reading, step = cost, pace.decode
        if is_shared:
            reading += pace.decode * max(cost / (SHARE * pace.decode), tokens / self._mixed)
            step += min(SHARE * pace.decode, self._mixed * each)
        answer = step * min(max_tokens, self._answer + self._deviation)
        departures = max(0, load.waiting + 1 - load.seats)  # before there is a seat
        queued = departures * step * self._answer / self._seats + pace.cost(*own)
        return self._factor * (_MARGIN if is_shared else 1.0) * (max(reading, queued) + answer)

    def observe_answer(self, tokens: int, *, is_over: bool = True) -> None:
        """An answer has so many tokens, and is complete or was given up."""
        if not is_over and tokens <= self._answer:
            return
        if not self._has_seen:
            self._answer, self._has_seen = float(tokens), True
        self._deviation += (1 - _KEPT) * (abs(tokens - self._answer) - self._deviation)
        self._answer += (1 - _KEPT) * (tokens - self._answer)

    def observe(self, forecast: float | None, seconds: float, *, is_over: bool) -> None:
        """A request has taken ``seconds``, and is complete (``is_over``) or was given up."""
        if not forecast or not (is_over or seconds > forecast):
            return
        ratio = self._factor * seconds / forecast
        self._factor = min(_MOST, max(1.0, _KEPT * self._factor + (1 - _KEPT) * ratio))


def _work(pace: Pace, spans: Iterable[PromptSpan]) -> tuple[float, float]:
    """Seconds and tokens of prompts."""
    return sum(pace.cost(*span) for span in spans), float(sum(count for _, count in spans))
