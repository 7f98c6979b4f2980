"""The engine's events to the pieces of an answer that every API has, and those, as an API writes them, to chunks.

``Answer`` is the only place that tells the kinds of events apart. An API's ``Wire`` says what each piece looks like.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from pacellm.errors import EngineError, PaceError
from pacellm.types import (
    Admitted,
    ChoiceEnded,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    Progress,
    PromptScores,
    TokenLogprob,
)

from ..event_queue import EventQueue, Numbered
from ..generation import Generation
from ..service import Service
from ..sse import PartWriter
from .logprobs import Scored, TokenTexts
from .parsers import AnswerParser
from .places import NOTHING, Sent
from .progress import PromptProgress
from .report import report
from .tool_calls import MessageDelta

Chunk = dict[str, Any]
Part = Chunk | bytes
"""A chunk, or the whole server-sent event of one that was written already."""


class Said(NamedTuple):
    """More of a choice.

    Attributes:
        choice: its number among all choices of the HTTP request.
        deltas: what is new of its message; none while nothing is certain.
        scored: its new tokens, where their log-probabilities were asked for.
        num_tokens: of the choice so far.
    """

    choice: int
    deltas: Sequence[MessageDelta]
    scored: Sequence[Scored]
    num_tokens: int


class Ended(NamedTuple):
    """The end of a choice.

    Attributes:
        choice: its number among all choices of the HTTP request.
        deltas: what was held back of its message.
        reason, stop_reason: why it ended.
        num_calls: of tools, in its message. num_tokens: of the choice.
        report: on the request, with its last choice.
    """

    choice: int
    deltas: Sequence[MessageDelta]
    reason: FinishReason
    stop_reason: str | int | None
    num_calls: int
    num_tokens: int
    report: Chunk | None


class Wire(Protocol):
    """How one API writes an answer. ``number`` is the generation's among those of the HTTP request."""

    done: bytes
    """What a stream that is whole ends with."""

    def begin(self) -> Iterable[Part]:
        """What stands before everything."""

    def progress(self, number: int, counts: Chunk) -> Part:
        """How far a prompt has come."""

    def prompt_scores(self, number: int, scores: Sequence[TokenLogprob]) -> Iterable[Part]:
        """Log-probabilities of a prompt's next tokens."""

    def said(self, said: Said) -> Iterable[Part]:
        """More of a choice."""

    def ended(self, ended: Ended) -> Iterable[Part]:
        """The end of a choice."""

    async def complete(self, finished: Sequence[Finished]) -> Iterable[Part]:
        """What stands behind everything, once all generations have finished."""

    def event(self, chunk: Chunk) -> bytes:
        """A chunk as an event of a stream."""

    def failed(self, error: PaceError) -> bytes:
        """A failure in a stream, as an event."""


class Choice:
    """Reads one choice.

    Args:
        index: among all choices of the HTTP request.
        parser: of its text.
        texts: of its tokens.
    """

    def __init__(self, index: int, parser: AnswerParser, texts: TokenTexts) -> None:
        self._index, self._parser, self._texts = index, parser, texts
        self._num_tokens = 0

    def push(self, event: Delta) -> Said:
        """More of it."""
        self._num_tokens += len(event.token_ids)
        scored = [self._texts.push(item, is_last=event.is_last) for item in event.logprobs] if event.logprobs else ()
        return Said(self._index, self._parser.push(event.text), scored, self._num_tokens)

    def end(self, reason: FinishReason, stop_reason: str | int | None, told: Chunk | None = None) -> Ended:
        """Its end."""
        deltas = self._parser.finish()
        return Ended(self._index, deltas, reason, stop_reason, self._parser.num_calls, self._num_tokens, told)


class Answer:
    """The answer to one HTTP request.

    Args:
        service: where the generations were submitted.
        generations: with as many choices each.
        events: that they share.
        parsers: of the choices' texts, one generation's after the other's.
        wire: of the API.
        with_progress: a stream is told how far prompts have come.
        is_lost: the session that it goes on from was gone, whatever admission finds.
        outlives: where the session has taken the answer before its client went, it is completed all the same.
        also_close: called when it is over, after the generations are closed.
        sent: by generation, in which passages that were called back are looked up.

    Attributes:
        headers: what admission found of the session.
        is_whole: all that there is has been handed out.
    """

    def __init__(
        self,
        service: Service,
        generations: Sequence[Generation],
        events: EventQueue,
        parsers: Sequence[AnswerParser],
        wire: Wire,
        *,
        with_progress: bool = False,
        is_lost: bool = False,
        outlives: bool = False,
        also_close: Callable[[], None] = lambda: None,
        sent: Sequence[Sent] = (),
    ) -> None:
        self._service, self._generations, self._events, self._wire = service, generations, events, wire
        self._is_lost, self._outlives, self._also_close, self._sent = is_lost, outlives, also_close, sent
        self._n = generations[0].request.n
        self._choices = [
            Choice(index, parser, self._token_texts(generations[index // self._n]))
            for index, parser in enumerate(parsers)
        ]
        self._going = [self._n] * len(generations)  # choices that have not ended, by generation
        self._last_ends: dict[int, ChoiceEnded] = {}  # by generation; the report on the request rides on them
        self._finished: list[Finished] = []
        self._progress = [PromptProgress(one, service) for one in generations] if with_progress else []
        self._held: list[Numbered] = []  # events that came while admission was waited for
        self._silence = 0.0  # seconds
        self._error: PaceError | None = None
        self._has_begun = self._is_closed = False
        self.headers: dict[str, str] = {}
        self.is_whole = False

    async def admitted(self, timeout: float) -> dict[str, str]:
        """What admission found, as headers; "queued" where it has not come after ``timeout`` seconds.

        Raises:
            PaceError: the request failed before that.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while (first := next((event for number, event in self._held if number == 0), None)) is None:
            found = await self._events.get(max(0.0, end - loop.time()))
            if not found:
                return {"X-PaceLLM-Session": "queued"}
            self._held += found
        if isinstance(first, Failed):
            raise first.error
        return self._headers_of(first) if isinstance(first, Admitted) else {"X-PaceLLM-Session": "queued"}

    async def next(self, timeout: float | None = None) -> list[Part] | None:
        """What comes next, which may be nothing that shows; None after ``timeout`` seconds of silence.

        Raises:
            PaceError: one of the generations failed.
        """
        if not self._has_begun:
            self._has_begun = True
            return list(self._wire.begin())
        if self._error is not None:
            raise self._error
        if len(self._finished) == len(self._generations):
            last = list(await self._wire.complete(self._finished))
            self.is_whole = True
            return last
        wait = min(self._service.settings.progress_seconds, timeout) if self._progress and timeout else timeout
        events, self._held = self._held or await self._events.get(wait), []
        if not events:
            return self._silent(wait or 0.0, timeout or 0.0)
        self._silence = 0.0
        return self._read(events)

    def as_events(self, parts: Iterable[Part]) -> bytes:
        """Parts of a stream as it is sent."""
        return b"".join([part if isinstance(part, bytes) else self._wire.event(part) for part in parts])

    def write_at_once(self, writer: PartWriter) -> None:
        """From now on text that comes while :meth:`next` waits is written, and does not wake the task that waits."""

        def take(number: int, event: Event) -> bool:
            if type(event) is not Delta or not writer.takes_parts:
                return False
            try:
                data = self.as_events(self._parts(number, event))
            except Exception as error:  # whoever waits must know that something is missing
                self._service.engine.faults.note("delivery", error)
                self._events.push(number, Failed(EngineError("an event of this request could not be delivered")))
                return True
            if data:
                writer.write_part(data)
            return True

        self._events.take_at_once = take

    def _read(self, events: Iterable[Numbered]) -> list[Part]:
        """What events come to, as far as none of them is a failure."""
        parts: list[Part] = []
        for number, event in events:
            if isinstance(event, Failed):
                self._error = event.error
                break
            parts += self._parts(number, event)
        return parts

    def _silent(self, waited: float, timeout: float) -> list[Part] | None:
        """After so many seconds without an event: new places of what is queued, or how long it has been silent."""
        places = ((number, one.queued()) for number, one in enumerate(self._progress))
        parts = [self._wire.progress(number, place) for number, place in places if place is not None]
        self._silence = 0.0 if parts else self._silence + waited
        if parts or self._silence < timeout:
            return parts
        self._silence = 0.0
        return None

    def close(self) -> None:
        """Cancel what has not ended."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._outlives or self.is_whole:
            self._end()
            return
        for generation in self._generations:
            generation.cancel()
        self._service.finish(self._settle())

    async def _settle(self) -> None:
        """Nobody reads any more, but a request that is cancelled may be complete already: the engine tells."""
        try:
            while len(self._finished) < len(self._generations):
                if self._events.is_empty and not self._held and all(one.has_ended for one in self._generations):
                    return
                events, self._held = self._held or await self._events.get(None), []
                for number, event in events:
                    if not isinstance(event, Failed):
                        list(self._parts(number, event))
            await self._wire.complete(self._finished)
        finally:
            self._end()

    def _end(self) -> None:
        for generation in self._generations:
            generation.close()
        self._also_close()

    def _parts(self, number: int, event: Event) -> Iterable[Part]:
        """What an event comes to."""
        match event:
            case Delta():
                return self._wire.said(self._choices[number * self._n + event.index].push(event))
            case ChoiceEnded():
                return self._choice_ended(number, event)
            case Finished():
                return self._finish(number, event)
            case Admitted():
                self._admit(number, event)
            case Progress() if self._progress:
                return (self._wire.progress(number, self._progress[number].read(event)),)
            case PromptScores():
                return self._wire.prompt_scores(number, event.logprobs)
        return ()

    def _admit(self, number: int, event: Admitted) -> None:
        self.headers = self.headers or self._headers_of(event)
        if self._progress:
            self._progress[number].admitted(event.cached_tokens)

    def _choice_ended(self, number: int, event: ChoiceEnded) -> Iterable[Part]:
        self._going[number] -= 1
        if not self._going[number]:
            self._last_ends[number] = event
            return ()
        return self._wire.ended(self._choices[number * self._n + event.index].end(event.reason, event.stop_reason))

    def _finish(self, number: int, event: Finished) -> Iterable[Part]:
        """The end of a generation's only or last choice, with what is told of the request."""
        self._finished.append(event)
        last = self._last_ends.get(number) or ChoiceEnded(0, event.reason, event.stop_reason)
        request = self._generations[number].request
        sent = self._sent[number] if self._sent else NOTHING
        told = report(request, event, self._session(event.session), self._service.tokenizer, sent)
        choice = self._choices[number * self._n + last.index]
        return self._wire.ended(choice.end(last.reason, last.stop_reason, told))

    def _session(self, found: str) -> str:
        """What became of the session."""
        return "lost" if self._is_lost else found

    def _headers_of(self, found: Admitted) -> dict[str, str]:
        headers = {"X-PaceLLM-Session": self._session(found.session)}
        if found.session != "none":
            headers["X-PaceLLM-Dropped-Tokens"] = str(found.kinship.dropped_tokens)
        return headers

    def _token_texts(self, generation: Generation) -> TokenTexts:
        request = generation.request
        return TokenTexts(
            self._service.tokenizer.vocabulary,
            skip_special=request.sampling.skip_special_tokens,
            is_start=not request.continues,
        )
