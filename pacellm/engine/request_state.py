"""Requests while they are in the engine, with their text, and the events that they have for whoever asked."""

from __future__ import annotations

import dataclasses
import os
from array import array
from dataclasses import dataclass, field

from pacellm.engine.sequence import Sequence
from pacellm.memory.trace import TokenTrace
from pacellm.text.detokenizer import Vocabulary
from pacellm.text.stream import TextStream
from pacellm.types import Event, Finished, GenerationRequest


@dataclass
class RequestState:
    """A request in the engine, or one of its choices.

    Attributes:
        sequence, text: its tokens, and their text as it grows; None without a tokenizer.
        last: its last event, once it is complete.
        index: of the choice. ``choices``: all of its request, by index, where there are several.
        is_recorded: its commit is on its way to disk and can no longer be taken back.
    """

    sequence: Sequence
    text: TextStream | None
    last: Finished | None = None
    index: int = 0
    choices: list[RequestState] = field(default_factory=list)
    is_recorded: bool = False

    @property
    def request_id(self) -> str:
        """That of the request that it belongs to."""
        return self.sequence.id.rpartition("#")[0] if self.index else self.sequence.id

    @property
    def stopped_by(self) -> str | None:
        """The stop string that its text has met."""
        return None if self.text is None else self.text.stopped_by

    def push(self, token: int) -> str:
        """The text that a token adds, as far as it may be told."""
        return "" if self.text is None else self.text.push(token)

    def rest(self) -> str:
        """The text that was held back, at the end."""
        return "" if self.text is None else self.text.finish()


Requests = dict[str, RequestState]
"""By id; a choice is there from its first token on."""


class Outbox:
    """Events of a step, by request id, in the order in which they happened."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Event]] = []

    def put(self, *events: tuple[str, Event]) -> None:
        """Add events."""
        self._events += events

    def take(self) -> list[tuple[str, Event]]:
        """All that was put since this was last asked."""
        events, self._events = self._events, []
        return events


def new_request(request: GenerationRequest, max_tokens: int, vocabulary: Vocabulary | None) -> RequestState:
    """A checked request as it enters the engine, with all its choices.

    Args:
        max_tokens: to generate.
        vocabulary: for the answers' text; None gives ids only.
    """
    seed = request.sampling.seed
    sequence = Sequence(
        request=request,
        prompt=array("i", request.prompt),
        max_tokens=max_tokens,
        seed=int.from_bytes(os.urandom(8), "little") if seed is None else seed,
        tools=request.outline.tools,
        num_branches=request.n - 1,
        trace=TokenTrace() if request.trace else None,
    )
    state = RequestState(sequence, _new_text(request, vocabulary))
    if request.n > 1:
        state.choices = [state, *(_new_choice(sequence, index, vocabulary) for index in range(1, request.n))]
    return state


def _new_choice(first: Sequence, index: int, vocabulary: Vocabulary | None) -> RequestState:
    """A further choice, with a seed of its own that follows from the request's."""
    request = first.request
    sequence = Sequence(
        request=dataclasses.replace(request, request_id=f"{request.request_id}#{index}", commit=False, n=1),
        prompt=first.prompt,
        max_tokens=first.max_tokens,
        seed=(first.seed + index) % 2**63,
        is_branch=True,
    )
    return RequestState(sequence, _new_text(request, vocabulary), index=index)


def _new_text(request: GenerationRequest, vocabulary: Vocabulary | None) -> TextStream | None:
    if vocabulary is None:
        return None
    sampling = request.sampling
    return TextStream(
        vocabulary, sampling.stop, skip_special=sampling.skip_special_tokens, is_start=not request.continues
    )
