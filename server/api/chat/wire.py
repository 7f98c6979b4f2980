"""The pieces of an answer as OpenAI's chat completion chunks, and these added up to one answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from pacellm.errors import PaceError
from pacellm.types import Finished, FinishReason, GenerationRequest, TokenLogprob

from ... import sse
from ...errors import body_of
from ...reading.tools import NamedTool
from ...writing.answer import Chunk, Ended, Part, Said
from ...writing.logprobs import Scored
from ...writing.tool_calls import MessageDelta
from .schema import ChatCompletionRequest

_TEXT = {"content"}


class ChatWire:
    """The chunks of one generation.

    Args:
        request: that was submitted.
        body: what the client asked for.
        model: its name. fingerprint: of what answers depend on.
    """

    done = sse.DONE

    def __init__(self, request: GenerationRequest, body: ChatCompletionRequest, model: str, fingerprint: str) -> None:
        self._body, self._wants_usage = body, body.wants_usage() or not body.stream
        self._head = {
            "id": request.request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
            **({} if body.service_tier is None else {"service_tier": "default"}),
        }
        self._has_role: set[int] = set()  # choices that have begun
        self._text_events: dict[int, sse.TextEvent] = {}  # of a stream, by choice that has begun

    def begin(self) -> Iterable[Part]:
        """Nothing."""
        return ()

    def progress(self, number: int, counts: Chunk) -> Part:
        """How far the prompt has come."""
        return {**self._head, "choices": [], "prompt_progress": counts}

    def prompt_scores(self, number: int, scores: Sequence[TokenLogprob]) -> Iterable[Part]:
        """Nothing: they cannot be asked for."""
        return ()

    def said(self, said: Said) -> Iterable[Part]:
        """A chunk for each delta; the first has the log-probabilities, also where the tokens have no text yet."""
        index, deltas, scored, _ = said
        if not scored and len(deltas) == 1 and index in self._text_events and deltas[0].keys() == _TEXT:
            return (self._text_events[index](deltas[0]["content"]),)
        shown = _logprobs(scored)
        return [
            self._delta(index, delta, None if number else shown)
            for number, delta in enumerate(deltas or ([{}] if scored else []))
        ]

    def ended(self, ended: Ended) -> Iterable[Part]:
        """What was held back, and the end."""
        index = ended.choice
        chunks = [self._delta(index, delta, None) for delta in ended.deltas]
        delta = {} if index in self._has_role else {"role": "assistant", "content": ""}
        chunk = self._chunk(index, delta, None, self._reason(ended))
        if ended.stop_reason is not None:
            chunk["choices"][0]["stop_reason"] = ended.stop_reason
        return [*chunks, chunk if ended.report is None else {**chunk, "pacellm": ended.report}]

    async def complete(self, finished: Sequence[Finished]) -> Iterable[Part]:
        """The usage, where it is asked for."""
        (usage,) = (one.usage for one in finished)
        counts = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
        return [{**self._head, "choices": [], "usage": counts}] if self._wants_usage else []

    def event(self, chunk: Chunk) -> bytes:
        """A chunk as an event of a stream."""
        return sse.event(chunk)

    def failed(self, error: PaceError) -> bytes:
        """The error object as one."""
        return sse.event(body_of(error))

    def _delta(self, index: int, delta: MessageDelta, logprobs: Chunk | None) -> Chunk:
        if index in self._has_role:
            return self._chunk(index, delta, logprobs, None)
        self._has_role.add(index)
        if self._body.stream:
            hole = self._chunk(index, {"content": sse.TextEvent.HOLE}, None, None)
            self._text_events[index] = sse.TextEvent(sse.event(hole))
        return self._chunk(index, {"role": "assistant", "content": None, **delta}, logprobs, None)

    def _chunk(self, index: int, delta: MessageDelta, logprobs: Chunk | None, reason: str | None) -> Chunk:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [choice]}

    def _reason(self, ended: Ended) -> str:
        """OpenAI's word; where the function was named, calling it is no reason to end."""
        has_called = ended.num_calls > 0 and not isinstance(self._body.choice, NamedTool)
        return "tool_calls" if has_called and ended.reason is FinishReason.STOP else ended.reason.value


def _logprobs(scored: Sequence[Scored]) -> Chunk | None:
    if not scored:
        return None
    shown = [
        {
            "token": one.text, "logprob": one.logprob, "bytes": one.bytes,
            "top_logprobs": [{"token": top.text, "logprob": top.logprob, "bytes": top.bytes} for top in one.top],
        }
        for one in scored
    ]  # fmt: skip
    return {"content": shown, "refusal": None}


class ChatFold:
    """The non-streamed answer: the same chunks, added up."""

    def __init__(self) -> None:
        self._answer: Chunk = {}
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Chunk) -> None:
        """Add one."""
        self._answer |= {name: value for name, value in chunk.items() if name not in ("choices", "object")}
        for part in chunk["choices"]:
            self._choices.setdefault(part["index"], _Choice()).add(part)

    def whole(self) -> Chunk:
        """The answer."""
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        return {**self._answer, "object": "chat.completion", "choices": choices}


class _Choice:
    """One choice, added up."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}  # by field of the message
        self._calls: dict[int, Chunk] = {}
        self._logprobs: list[Chunk] = []
        self._last: Chunk = {}

    def add(self, part: Chunk) -> None:
        delta = part["delta"]
        for name in ("content", "reasoning_content", "reasoning"):
            if delta.get(name) is not None:
                self._texts.setdefault(name, []).append(delta[name])
        for piece in delta.get("tool_calls", ()):
            begun = {**piece, "function": {**piece["function"], "arguments": ""}}
            call = self._calls.setdefault(piece["index"], begun)
            call["function"]["arguments"] += piece["function"]["arguments"]
        self._logprobs += (part["logprobs"] or {}).get("content", [])
        self._last = part

    def whole(self) -> Chunk:
        logprobs = {"content": self._logprobs, "refusal": None} if self._logprobs else None
        last = {name: value for name, value in self._last.items() if name != "delta"}
        return {**last, "logprobs": logprobs, "message": self._message()}

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
        message |= {name: "".join(texts) for name, texts in self._texts.items()}
        calls = [{name: value for name, value in call.items() if name != "index"} for call in self._calls.values()]
        if calls:
            return message | {"content": message["content"] or None, "tool_calls": calls}
        return message if message["content"] is not None else message | {"content": ""}
