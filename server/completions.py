"""Events of one or several prompts to text_completion chunks, and chunks folded to one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pacellm.types import Admitted, Delta, Event, Failed, Finished, PromptScores, TokenLogprob
from server.answer import headers_of
from server.progress import events_of
from server.report import report
from server.schema.completions import CompletionRequest
from server.service import Generation, Service

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
        self._tokenizer = service.tokenizer
        self._offsets = [0] * len(generations)
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        self._head = {
            "id": f"cmpl-{generations[0].request.request_id.partition('-')[2]}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        self.headers: dict[str, str] = {}  # what admission found of the session

    async def __call__(self, timeout: float | None = None) -> AsyncIterator[Chunk | None]:
        """Every chunk as it comes; None after ``timeout`` seconds of silence.

        Raises:
            PaceError: one of the requests failed.
        """
        for index in range(len(self._generations)) if self._body.echo else ():
            yield self._echo(index)
        streams = [
            events_of(one, self._service, timeout, with_progress=self._body.return_progress)
            for one in self._generations
        ]
        async for index, event in merged(streams, timeout):
            match event:
                case None:
                    yield None
                case dict():
                    yield {**self._head, "choices": [], "prompt_progress": {"index": index, **event}}
                case Admitted():
                    self.headers = self.headers or headers_of(event)
                case PromptScores():
                    yield self._chunk(index, "", self._logprobs(index, event.logprobs))
                case Delta():
                    yield self._chunk(index, event.text, self._logprobs(index, event.logprobs))
                case Finished():
                    self._count(event)
                    chunk = self._chunk(index, "", None, event.reason.value, event.stop_reason)
                    told = {"pacellm": report(self._generations[index].request, event)}
                    (chunk if len(self._generations) == 1 else chunk["choices"][0]).update(told)
                    yield chunk
                case Failed():
                    raise event.error
        yield {**self._head, "choices": [], "usage": self._whole_usage()}

    def close(self) -> None:
        """Cancel what has not ended."""
        for generation in self._generations:
            generation.close()

    def _echo(self, index: int) -> Chunk:
        prompt = self._generations[index].request.prompt
        first = None
        if self._body.logprobs is not None:
            first = self._columns(index, [(self._tokenizer.token_text(prompt[0]), None, None)])
        return self._chunk(index, self._tokenizer.decode(list(prompt)), first)

    def _chunk(
        self, index: int, text: str, logprobs: Chunk | None, reason: str | None = None, stop: str | int | None = None
    ) -> Chunk:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [{**choice, **({} if stop is None else {"stop_reason": stop})}]}

    def _logprobs(self, index: int, items: Sequence[TokenLogprob]) -> Chunk | None:
        text = self._tokenizer.token_text
        rows = [
            (text(item.token_id), item.logprob, {text(token): value for token, value in item.top}) for item in items
        ]
        return self._columns(index, rows) if rows else None

    def _columns(self, index: int, rows: Sequence[tuple[str, float | None, dict[str, float] | None]]) -> Chunk:
        offsets = []
        for token, _, _ in rows:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        tokens, values, tops = (list(column) for column in zip(*rows, strict=True))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

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


async def merged(
    streams: Sequence[AsyncIterator[Event | Chunk | None]], timeout: float | None
) -> AsyncIterator[tuple[int, Event | Chunk | None]]:
    """Every stream's events with its index, as they come; (0, None) after ``timeout`` seconds of silence."""
    if len(streams) == 1:
        async for one in streams[0]:
            yield 0, one
        return
    queue: asyncio.Queue[tuple[int, Event | Chunk]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Event | Chunk | None]) -> None:
        async for event in stream:
            if event is not None:
                queue.put_nowait((index, event))

    pumps = [asyncio.create_task(pump(index, one)) for index, one in enumerate(streams)]
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
