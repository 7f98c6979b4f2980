"""Events to OpenAI's chunks, and chunks folded to one answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from pacellm.types import Admitted, ChoiceEnded, Delta, Failed, Finished, FinishReason

from ...reading.tools import NamedTool
from ...service import Generation, Service
from ...writing.logprobs import TokenTexts
from ...writing.parsers import AnswerParser
from ...writing.progress import events_of
from ...writing.report import report
from ...writing.responding import headers_of
from ...writing.tool_calls import MessageDelta
from .schema import ChatCompletionRequest

Chunk = dict[str, Any]


class Chunks:
    """The chunks of one generation.

    Args:
        generation: submitted.
        readers: of the text, one for each choice.
        body: what the client asked for.
        service: where it was submitted.
    """

    def __init__(
        self, generation: Generation, readers: Sequence[AnswerParser], body: ChatCompletionRequest, service: Service
    ) -> None:
        self._readers = readers
        self._generation, self._body, self._service = generation, body, service
        request = generation.request
        self._texts = [
            TokenTexts(
                service.tokenizer.vocabulary,
                skip_special=request.sampling.skip_special_tokens,
                is_start=not request.continues,
            )
            for _ in readers
        ]
        self._head = {
            "id": generation.request.request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        self._going = generation.request.n  # choices that have not ended
        self._several = self._going > 1
        self._end_of_last: list[Chunk] = []  # kept until the request's end, which rides on it
        self.headers: dict[str, str] = {}  # what admission found of the session
        self._has_role: set[int] = set()  # choices that have begun

    async def __call__(self, timeout: float | None = None) -> AsyncIterator[Chunk | None]:
        """Every chunk in order; None after ``timeout`` seconds of silence.

        Raises:
            PaceError: the request failed.
        """
        wanted = self._body.return_progress
        async for event in events_of(self._generation, self._service, timeout, with_progress=wanted):
            match event:
                case None:
                    yield None
                case dict():
                    yield {**self._head, "choices": [], "prompt_progress": event}
                case Admitted():
                    self.headers = self.headers or headers_of(event)
                case Delta():
                    pieces = self._readers[event.index].push(event.text)
                    for chunk in self._deltas(event.index, pieces, self._logprobs(event)):
                        yield chunk
                case ChoiceEnded():
                    ends = self._end(event.index, event.reason, event.stop_reason)
                    self._going -= 1
                    if not self._going:
                        self._end_of_last = [ends.pop()]
                    for chunk in ends:
                        yield chunk
                case Finished():
                    for chunk in self._last(event):
                        yield chunk
                case Failed():
                    raise event.error

    def _deltas(self, index: int, pieces: Sequence[MessageDelta], logprobs: Sequence[Chunk] = ()) -> Iterator[Chunk]:
        """A chunk for each piece; the first has the log-probabilities, also where the tokens have no text yet."""
        for number, piece in enumerate(pieces or ([{}] if logprobs else [])):
            delta = piece
            if index not in self._has_role:
                self._has_role.add(index)
                delta = {"role": "assistant", "content": None, **piece}
            yield {**self._head, "choices": [self._choice(index, delta, None, () if number else logprobs)]}

    def _end(self, index: int, reason: FinishReason, stop_reason: str | int | None) -> list[Chunk]:
        """What the reader held back, and the end of a choice."""
        chunks = list(self._deltas(index, self._readers[index].finish()))
        delta = {} if index in self._has_role else {"role": "assistant", "content": ""}
        choice = self._choice(index, delta, self._reason(index, reason), ())
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return [*chunks, {**self._head, "choices": [choice]}]

    def _reason(self, index: int, reason: FinishReason) -> str:
        """OpenAI's word; where the function was named, calling it is no reason to end."""
        has_called = self._readers[index].num_calls > 0 and not isinstance(self._body.choice, NamedTool)
        return "tool_calls" if has_called and reason is FinishReason.STOP else reason.value

    def _last(self, event: Finished) -> list[Chunk]:
        ends = self._end_of_last if self._several else self._end(0, event.reason, event.stop_reason)
        choices = ends.pop()["choices"]
        pace = report(self._generation.request, event)
        usage = {
            "prompt_tokens": event.usage.prompt_tokens,
            "completion_tokens": event.usage.completion_tokens,
            "total_tokens": event.usage.prompt_tokens + event.usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": event.usage.cached_tokens},
        }
        return [
            *ends,
            {**self._head, "choices": choices, "pacellm": pace},
            {**self._head, "choices": [], "usage": usage},
        ]

    def _choice(
        self, index: int, delta: dict[str, Any], reason: str | None, logprobs: Sequence[Chunk]
    ) -> dict[str, Any]:
        shown = {"content": list(logprobs), "refusal": None} if logprobs else None
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, event: Delta) -> list[Chunk]:
        texts = self._texts[event.index]
        found = [texts.push(item, is_last=event.is_last) for item in event.logprobs]
        return [
            {
                "token": one.text, "logprob": one.logprob, "bytes": one.bytes,
                "top_logprobs": [{"token": top.text, "logprob": top.logprob, "bytes": top.bytes} for top in one.top],
            }
            for one in found
        ]  # fmt: skip


async def fold(chunks: AsyncIterator[Chunk | None]) -> Chunk:
    """The non-streamed answer: the same chunks, added up."""
    answer: Chunk = {}
    choices: dict[int, Chunk] = {}
    async for chunk in chunks:
        if chunk is None:
            continue
        answer = {**answer, **{name: value for name, value in chunk.items() if name not in ("choices", "object")}}
        for part in chunk["choices"]:
            _add(choices.setdefault(part["index"], {"logprobs": [], "calls": {}}), part)
    answer.pop("prompt_progress", None)
    return {**answer, "object": "chat.completion", "choices": [_folded(choices[index]) for index in sorted(choices)]}


def _add(choice: Chunk, part: Chunk) -> None:
    delta = part["delta"]
    for name in ("content", "reasoning_content", "reasoning"):
        if delta.get(name) is not None:
            choice.setdefault(name, []).append(delta[name])
    for piece in delta.get("tool_calls", ()):
        call = choice["calls"].setdefault(piece["index"], {**piece, "function": {**piece["function"], "arguments": ""}})
        call["function"]["arguments"] += piece["function"]["arguments"]
    choice["logprobs"] += (part["logprobs"] or {}).get("content", [])
    choice["last"] = part


def _folded(choice: Chunk) -> Chunk:
    message: Chunk = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
    for name in ("content", "reasoning_content", "reasoning"):
        if name in choice:
            message[name] = "".join(choice[name])
    calls = [{name: value for name, value in call.items() if name != "index"} for call in choice["calls"].values()]
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    elif message["content"] is None:
        message["content"] = ""
    logprobs = {"content": choice["logprobs"], "refusal": None} if choice["logprobs"] else None
    last = {name: value for name, value in choice["last"].items() if name != "delta"}
    return {**last, "logprobs": logprobs, "message": message}
