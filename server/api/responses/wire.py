"""The pieces of an answer as events of OpenAI's Responses API; the whole answer is what the last one carries."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pacellm.errors import PaceError, RequestError
from pacellm.types import Finished, FinishReason, GenerationRequest, TokenLogprob

from ... import sse
from ...schema import Strict
from ...writing.answer import Chunk, Ended, Part, Said
from ...writing.tool_calls import MessageDelta
from .output_items import OutputItems
from .schema import ResponseRequest
from .state import ConversationState

# what chat calls it, and what this endpoint does
_NAMES = (
    (r"\bmax_tokens\b", "max_output_tokens"),
    (r"\bmessages(\.\d+)?\.tool_call_id\b", "input: call_id"),
    (r"\bmessages(\.\w+)*", "input"),
    (r"\b(tools\.\d+|tool_choice)\.function\b", r"\1"),
    (r"\bresponse_format\b", "text.format"),
    (r"\breasoning_effort\b", "reasoning.effort"),
)


class ResponsesWire:
    """The events of one response.

    Args:
        state: what it goes on from, and where it is kept.
        request: that was submitted.
        body: what the client asked for.
        model: its name.
    """

    done = b""

    def __init__(self, state: ConversationState, request: GenerationRequest, body: ResponseRequest, model: str) -> None:
        self._state, self._body = state, body
        self._response = _head(state, body, request, model)
        self._items, self._number = OutputItems(), -1
        self._num_reasoning = 0  # tokens
        self._ended: Ended | None = None

    def begin(self) -> Iterable[Part]:
        """That it has begun."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)

    def progress(self, number: int, counts: Chunk) -> Part:
        """How far the prompt has come."""
        return self._event("pacellm.prompt_progress", prompt_progress=counts)

    def prompt_scores(self, number: int, scores: Sequence[TokenLogprob]) -> Iterable[Part]:
        """Nothing: they cannot be asked for."""
        return ()

    def said(self, said: Said) -> Iterable[Part]:
        """What it adds to the items."""
        return self._deltas(said.deltas, said.num_tokens)

    def ended(self, ended: Ended) -> Iterable[Part]:
        """The ends of the items."""
        self._ended, is_whole = ended, ended.reason is not FinishReason.LENGTH
        events = self._deltas(ended.deltas, ended.num_tokens)
        return [*events, *(self._event(kind, **more) for kind, more in self._items.finish(is_whole=is_whole))]

    async def complete(self, finished: Sequence[Finished]) -> Iterable[Part]:
        """The response, once it is kept."""
        assert self._ended is not None
        is_whole = self._ended.reason is not FinishReason.LENGTH
        status = "completed" if is_whole else "incomplete"
        self._response |= {
            "status": status,
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": self._items.output,
            "usage": _usage(finished[0], self._num_reasoning, is_stored=self._body.is_stored),
            "pacellm": self._ended.report,
        }
        await self._state.keep(self._response, self._items.message)
        return [self._event(f"response.{status}", response=self._response)]

    def event(self, chunk: Chunk) -> bytes:
        """An event with its name."""
        return sse.typed_event(chunk)

    def failed(self, error: PaceError) -> bytes:
        """The response as one that failed."""
        problem = {"code": error.code or error.type, "message": error.message}
        failed = {**self._response, "status": "failed", "error": problem}
        return sse.typed_event(self._event("response.failed", response=failed))

    def _event(self, kind: str, **fields: Any) -> Chunk:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _deltas(self, deltas: Sequence[MessageDelta], num_tokens: int) -> list[Part]:
        events: list[Part] = [self._event(kind, **more) for delta in deltas for kind, more in self._items.push(delta)]
        if self._items.is_reasoning:
            self._num_reasoning = num_tokens
        return events


class ResponseFold:
    """The response: what the last event carries."""

    def __init__(self) -> None:
        self._last: Chunk = {}

    def add(self, chunk: Chunk) -> None:
        """Add an event."""
        self._last = chunk

    def whole(self) -> Chunk:
        """The response."""
        return self._last["response"]


def named(error: RequestError) -> RequestError:
    """The error, its field called as this endpoint calls it."""
    for pattern, name in _NAMES:
        error.param = re.sub(pattern, name, error.param or "").partition(":")[0] or None
        error.message = re.sub(pattern, name, error.message)
    return error


def _shown(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Strict) else value


def _format(body: ResponseRequest) -> Chunk:
    """The text's form as it was asked for."""
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _usage(event: Finished, reasoning_tokens: int, *, is_stored: bool) -> Chunk:
    """Tokens of a stored response's prompt that were not there are kept for those that go on from it."""
    usage = event.usage
    kept = usage.prompt_tokens - usage.cached_tokens if is_stored else 0
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": kept},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _head(state: ConversationState, body: ResponseRequest, request: GenerationRequest, model: str) -> Chunk:
    """A response that has just begun."""
    sampling, conversation = request.sampling, body.conversation_id
    return {
        "id": state.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": model,
        "output": [],
        "frequency_penalty": sampling.frequency_penalty,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": body.previous_response_id,
        "conversation": None if conversation is None else {"id": conversation},
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.is_stored,
        "temperature": sampling.temperature,
        "text": {"format": _format(body), "verbosity": (body.text and body.text.verbosity) or "medium"},
        "tool_choice": _shown(body.tool_choice) or "auto",
        "tools": [_shown(tool) for tool in body.tools or ()],
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
