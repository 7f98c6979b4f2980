"""Events of one or several prompts to text_completion chunks, and chunks folded to one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from pacellm.types import Admitted, ChoiceEnded, Delta, Event, Failed, Finished, PromptScores, TokenLogprob

from ...service import Generation, Service
from ...writing.logprobs import Alternative, Scored, TokenTexts
from ...writing.progress import events_of
from ...writing.report import report
from ...writing.responding import headers_of
from .schema import CompletionRequest

Chunk = dict[str, Any]
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Completions:
    """The chunks of one HTTP request's prompts, each its own choice.

    Args:
        generations: submitted, one for each prompt.
        body: what the client asked for.
        service: where they were submitted.
    """

    def __init__(self, generations: Sequence[Generation], body: CompletionRequest, service: Service) -> None:
        self._generations, self._body, self._service = generations, body, service
        vocabulary, first = service.tokenizer.vocabulary, generations[0].request
        self._n = first.n
        self._prompts = [TokenTexts(vocabulary, skip_special=False, is_start=True) for _ in generations]
        self._left = [len(one.request.prompt) for one in generations]  # of a prompt's tokens, to be scored
        self._texts = [
            TokenTexts(
                vocabulary, skip_special=first.sampling.skip_special_tokens, is_start=not one.request.continues
            )
            for one in generations for _ in range(self._n)
        ]  # fmt: skip
        self._offsets = [0] * len(self._texts)
        self._ends: dict[int, list[ChoiceEnded]] = {}  # by prompt, of its choices
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        self._head = {
            "id": f"cmpl-{generations[0].request.request_id.partition('-')[2]}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        self.headers: dict[str, str] = {}  # what admission found of the session
        self._pumps: list[asyncio.Task[None]] = []

    async def __call__(self, timeout: float | None = None) -> AsyncIterator[Chunk | None]:
        """Every chunk as it comes; None after ``timeout`` seconds of silence.

        Raises:
            PaceError: one of the requests failed.
        """
        for number in range(len(self._generations)) if self._body.echo else ():
            for chunk in self._echo(number):
                yield chunk
        streams = [
            events_of(one, self._service, timeout, with_progress=self._body.return_progress)
            for one in self._generations
        ]
        async for number, event in merged(streams, timeout, self._pumps):
            match event:
                case None:
                    yield None
                case dict():
                    yield {**self._head, "choices": [], "prompt_progress": {"index": number * self._n, **event}}
                case Admitted():
                    self.headers = self.headers or headers_of(event)
                case PromptScores():
                    rows = [self._score(number, item) for item in event.logprobs]
                    for index in self._choices(number):
                        yield self._chunk(index, "", self._columns(index, rows))
                case Delta():
                    index = number * self._n + event.index
                    rows = [self._texts[index].push(item, is_last=event.is_last) for item in event.logprobs]
                    yield self._chunk(index, event.text, self._columns(index, rows))
                case ChoiceEnded():
                    ends = self._ends.setdefault(number, [])
                    ends.append(event)
                    if len(ends) < self._n:  # what is told of the request rides on the last one
                        yield self._end(number, event)
                case Finished():
                    yield self._last(number, event)
                case Failed():
                    raise event.error
        yield {**self._head, "choices": [], "usage": self._whole_usage()}

    def close(self) -> None:
        """Cancel what has not ended."""
        for task in self._pumps:
            task.cancel()
        for generation in self._generations:
            generation.close()

    def _choices(self, number: int) -> range:
        """A prompt's choices."""
        return range(number * self._n, (number + 1) * self._n)

    def _echo(self, number: int) -> Iterator[Chunk]:
        prompt, rows = self._generations[number].request.prompt, []
        if self._body.logprobs is not None:
            self._left[number] -= 1
            rows = [self._prompts[number].first(prompt[0], is_last=not self._left[number])]
        text = self._service.tokenizer.decode(list(prompt))
        for index in self._choices(number):
            yield self._chunk(index, text, self._columns(index, rows))

    def _score(self, number: int, item: TokenLogprob) -> Scored:
        self._left[number] -= 1
        return self._prompts[number].push(item, is_last=not self._left[number])

    def _end(self, number: int, event: ChoiceEnded) -> Chunk:
        return self._chunk(number * self._n + event.index, "", None, event.reason.value, event.stop_reason)

    def _last(self, number: int, event: Finished) -> Chunk:
        """The end of a prompt's only or last choice, with what is told of the request."""
        self._count(event)
        told = {"pacellm": report(self._generations[number].request, event)}
        if self._n > 1:
            chunk = self._end(number, self._ends.pop(number)[-1])
        else:
            chunk = self._chunk(number, "", None, event.reason.value, event.stop_reason)
        (chunk if len(self._generations) == 1 else chunk["choices"][0]).update(told)
        return chunk

    def _chunk(
        self, index: int, text: str, logprobs: Chunk | None, reason: str | None = None, stop: str | int | None = None
    ) -> Chunk:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [{**choice, **({} if stop is None else {"stop_reason": stop})}]}

    def _columns(self, index: int, rows: Sequence[Scored]) -> Chunk | None:
        if not rows:
            return None
        columns: Chunk = {name: [] for name in _LISTS}
        for row in rows:
            columns["tokens"].append(row.text)
            columns["token_logprobs"].append(row.logprob)
            columns["top_logprobs"].append(None if row.logprob is None else _named([row.own, *row.top]))
            columns["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(row.text)
        return columns

    def _count(self, event: Finished) -> None:
        for name in self._usage:
            self._usage[name] += getattr(event.usage, name)

    def _whole_usage(self) -> Chunk:
        prompt, completion, cached = self._usage.values()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _named(alternatives: Sequence[Alternative]) -> dict[str, float]:
    """Log-probabilities by text, the chosen token's first; other tokens of the same text by their numbers."""
    found: dict[str, float] = {}
    tokens: set[int] = set()
    for one in alternatives:
        if one.token not in tokens:
            tokens.add(one.token)
            found[one.text if one.text not in found else f"token_id:{one.token}"] = one.logprob
    return found


async def merged(
    streams: Sequence[AsyncIterator[Event | Chunk | None]], timeout: float | None, pumps: list[asyncio.Task[None]]
) -> AsyncIterator[tuple[int, Event | Chunk | None]]:
    """Every stream's events with its index, as they come; (0, None) after ``timeout`` seconds of silence.

    Args:
        pumps: gets the tasks that read the streams, which whoever does not read to the end must cancel.
    """
    if len(streams) == 1:
        async for one in streams[0]:
            yield 0, one
        return
    queue: asyncio.Queue[tuple[int, Event | Chunk]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Event | Chunk | None]) -> None:
        async for event in stream:
            if event is not None:
                queue.put_nowait((index, event))

    pumps += [asyncio.create_task(pump(index, one)) for index, one in enumerate(streams)]
    try:
        left = len(pumps)
        while left:
            try:
                async with asyncio.timeout(timeout):
                    index, event = await queue.get()
            except TimeoutError:
                yield 0, None
                continue
            left -= isinstance(event, Finished | Failed)
            yield index, event
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def fold(chunks: AsyncIterator[Chunk | None]) -> Chunk:
    """The non-streamed answer: the same chunks, added up."""
    answer: Chunk = {}
    choices: dict[int, Chunk] = {}
    async for chunk in chunks:
        if chunk is None:
            continue
        answer |= {name: value for name, value in chunk.items() if name != "choices"}
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], {**part, "text": "", "logprobs": None})
            text, logprobs = whole["text"] + part["text"], whole["logprobs"]
            if part["logprobs"] is not None:
                logprobs = logprobs or {name: [] for name in _LISTS}
                for name in _LISTS:
                    logprobs[name] += part["logprobs"][name]
            whole.update(part, text=text, logprobs=logprobs)
    return {**answer, "choices": [choices[index] for index in sorted(choices)]}
