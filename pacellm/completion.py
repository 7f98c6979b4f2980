"""An answer as one value, for whoever does not want its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pacellm.types import (
    BankReads,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    SessionStatus,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True)
class Completion:
    """What a prompt was answered with, added up. ``str`` of it is its text.

    Attributes:
        session: what was found of the session before this answer.
        bank: what it did to the session's banks; None where none took part.
        seconds: until its first token, and from there to its end.
    """

    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    usage: Usage
    session: SessionStatus
    bank: BankReads | None
    logprobs: tuple[TokenLogprob, ...]
    seconds: tuple[float, float]

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, events: Sequence[Event]) -> Completion:
        """Of all events of a request with one choice.

        Raises:
            PaceError: it failed.
        """
        last = events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        deltas = [event for event in events if isinstance(event, Delta)]
        return cls(
            "".join(delta.text for delta in deltas),
            tuple(token for delta in deltas for token in delta.token_ids),
            last.reason,
            last.usage,
            last.session,
            last.bank,
            tuple(one for delta in deltas for one in delta.logprobs),
            (last.queue_seconds + last.prefill_seconds, last.decode_seconds),
        )
