"""Events to OpenAI's chunks, and chunks folded to one answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from pacellm.types import Admitted, ChoiceEnded, Delta, Event, Failed, Finished, FinishReason, TokenLogprob
from server.progress import PromptProgress
from server.report import report
from server.schema.chat import ChatCompletionRequest
from server.service import Generation, Service

Chunk = dict[str, Any]


class Chunks:
    """The chunks of one generation.

    Args:
        generation: submitted.
        body: what the client asked for.
        service: where it was submitted.
    """

    def __init__(self, generation: Generation, body: ChatCompletionRequest, service: Service) -> None:
        self._generation, self._body, self._service = generation, body, service
        self._tokenizer = service.tokenizer
        self._head = {
            "id": generation.request.request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        self._progress = PromptProgress(generation, service)
        self._several = generation.request.n > 1
        self.found: str | None = None  # what admission found of the session
        self._has_role: set[int] = set()  # choices that have begun

    async def __call__(self, timeout: float | None = None) -> AsyncIterator[Chunk | None]:
        """Every chunk in order; None after ``timeout`` seconds of silence.

        Raises:
            PaceError: the request failed.
        """
        events: AsyncIterator[Event | dict[str, Any] | None] = self._generation.events(timeout)
        if self._body.return_progress and timeout is not None:
            events = self._progress.events(timeout)
        async for event in events:
            match event:
                case None:
                    yield None
                case dict():
                    yield {**self._head, "choices": [], "prompt_progress": event}
                case Admitted():
                    self.found = self.found or event.session
                case Delta():
                    yield self._delta(event)
                case ChoiceEnded():
                    yield self._end(event.index, event.reason, event.stop_reason)
                case Finished():
                    for chunk in self._last(event):
                        yield chunk
                case Failed():
                    raise event.error

    def _delta(self, event: Delta) -> Chunk:
        delta: dict[str, Any] = {"content": event.text}
        if event.index not in self._has_role:
            self._has_role.add(event.index)
            delta = {"role": "assistant", **delta}
        return {**self._head, "choices": [self._choice(event.index, delta, None, event.logprobs)]}

    def _end(self, index: int, reason: FinishReason, stop_reason: str | int | None) -> Chunk:
        delta = {} if index in self._has_role else {"role": "assistant", "content": ""}
        choice = self._choice(index, delta, reason.value, ())
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return {**self._head, "choices": [choice]}

    def _last(self, event: Finished) -> list[Chunk]:
        ends = [] if self._several else self._end(0, event.reason, event.stop_reason)["choices"]
        pace = report(self._generation.request, event)
        usage = {
            "prompt_tokens": event.usage.prompt_tokens,
            "completion_tokens": event.usage.completion_tokens,
            "total_tokens": event.usage.prompt_tokens + event.usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": event.usage.cached_tokens},
        }
        return [
            {**self._head, "choices": ends, "pacellm": pace},
            {**self._head, "choices": [], "usage": usage},
        ]

    def _choice(
        self, index: int, delta: dict[str, Any], reason: str | None, logprobs: tuple[TokenLogprob, ...]
    ) -> dict[str, Any]:
        content = [self._logprob(item) for item in logprobs]
        shown = {"content": content, "refusal": None} if content else None
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}

    def _logprob(self, item: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token(item.token_id, item.logprob),
            "top_logprobs": [self._token(token, logprob) for token, logprob in item.top],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


async def fold(chunks: AsyncIterator[Chunk | None]) -> Chunk:
    """The non-streamed answer: the same chunks, added up."""
    answer: Chunk = {}
    choices: dict[int, Chunk] = {}
    async for chunk in chunks:
        if chunk is None:
            continue
        answer = {**answer, **{name: value for name, value in chunk.items() if name not in ("choices", "object")}}
        for part in chunk["choices"]:
            _add(choices.setdefault(part["index"], {"text": [], "logprobs": []}), part)
    answer.pop("prompt_progress", None)
    return {**answer, "object": "chat.completion", "choices": [_folded(choices[index]) for index in sorted(choices)]}


def _add(choice: Chunk, part: Chunk) -> None:
    choice["text"].append(part["delta"].get("content", ""))
    choice["logprobs"] += (part["logprobs"] or {}).get("content", [])
    choice["last"] = part


def _folded(choice: Chunk) -> Chunk:
    message = {"role": "assistant", "content": "".join(choice["text"]), "refusal": None}
    logprobs = {"content": choice["logprobs"], "refusal": None} if choice["logprobs"] else None
    last = {name: value for name, value in choice["last"].items() if name != "delta"}
    return {**last, "logprobs": logprobs, "message": message}
