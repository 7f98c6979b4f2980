"""Events of a generation to those of OpenAI's Responses API; the whole answer is what the last one carries."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pacellm.errors import PaceError, RequestError
from pacellm.types import Admitted, Delta, Failed, Finished, FinishReason

from ... import sse
from ...schema import Strict
from ...service import Generation, Service
from ...writing.parsers import AnswerParser
from ...writing.progress import events_of
from ...writing.report import report
from ...writing.responding import headers_of
from ...writing.tool_calls import MessageDelta
from .output_items import OutputItems
from .schema import ResponseRequest
from .state import ConversationState

Event = dict[str, Any]
_ENDS = (b"event: response.completed\n", b"event: response.incomplete\n")
# what chat calls it, and what this endpoint does
_NAMES = (
    (r"\bmax_tokens\b", "max_output_tokens"),
    (r"\bmessages(\.\d+)?\.tool_call_id\b", "input: call_id"),
    (r"\bmessages(\.\w+)*", "input"),
    (r"\b(tools\.\d+|tool_choice)\.function\b", r"\1"),
    (r"\bresponse_format\b", "text.format"),
)


class Responses:
    """The events of one response.

    Args:
        continuation: its place in the state.
        generation: submitted.
        reader: of the text.
        body: what the client asked for.
        service: where it was submitted.
    """

    def __init__(
        self,
        continuation: ConversationState,
        generation: Generation,
        reader: AnswerParser,
        body: ResponseRequest,
        service: Service,
    ) -> None:
        self._continuation, self._generation, self._body, self._service = continuation, generation, body, service
        self._response = _head(continuation, body, service, generation)
        self._reader, self._items = reader, OutputItems()
        self._number = -1
        self._num_tokens = self._num_reasoning = 0
        self.headers: dict[str, str] = {}  # what admission found of the session

    async def __call__(self, timeout: float | None = None) -> AsyncIterator[Event | None]:
        """Every event in order; None after ``timeout`` seconds of silence.

        Raises:
            PaceError: the request failed.
        """
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        wanted = self._body.return_progress
        async for event in events_of(self._generation, self._service, timeout, with_progress=wanted):
            match event:
                case None:
                    yield None
                case dict():
                    yield self._event("pacellm.prompt_progress", prompt_progress=event)
                case Admitted():
                    self.headers = self._headers(event)
                case Delta():
                    for one in self._delta(event):
                        yield one
                case Finished():
                    for one in await self._last(event):
                        yield one
                case Failed():
                    raise event.error

    async def stream(self) -> sse.EventStream:
        """The events as server-sent ones, once admission is known or ``header_wait`` has passed.

        Raises:
            PaceError: the request failed before that.
        """
        try:
            found = await self._generation.admitted(self._service.settings.header_wait)
        except BaseException:
            self.close()
            raise
        headers = {"X-PaceLLM-Session": "queued"} if found is None else self._headers(found)
        return sse.EventStream(self._bytes(), self.close, headers, _ENDS)

    def _headers(self, found: Admitted) -> dict[str, str]:
        return headers_of(found, self.status(found.session))

    async def _bytes(self) -> AsyncIterator[bytes]:
        """Whole events; a failure is one too."""
        try:
            async for event in self(self._service.settings.keep_alive_seconds):
                yield sse.KEEP_ALIVE if event is None else sse.typed_event(event)
        except PaceError as error:
            problem = {"code": error.code or error.type, "message": error.message}
            failed = {**self._response, "status": "failed", "error": problem}
            yield sse.typed_event(self._event("response.failed", response=failed))

    async def whole(self) -> Event:
        """The response.

        Raises:
            PaceError: the request failed.
        """
        last: Event = {}
        async for event in self():
            last = event or last
        return last["response"]

    def status(self, session: str) -> str:
        """What became of the session that this response goes on from."""
        return "lost" if self._continuation.is_lost else session

    def close(self) -> None:
        """Cancel what has not ended; forget what was not kept."""
        self._generation.close()
        self._continuation.close()

    # -- events --------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _delta(self, event: Delta) -> list[Event]:
        self._num_tokens += len(event.token_ids)
        return self._pieces(self._reader.push(event.text))

    def _pieces(self, pieces: Sequence[MessageDelta]) -> list[Event]:
        events = [self._event(kind, **fields) for piece in pieces for kind, fields in self._items.push(piece)]
        if self._items.is_reasoning:
            self._num_reasoning = self._num_tokens
        return events

    async def _last(self, event: Finished) -> list[Event]:
        is_whole = event.reason is not FinishReason.LENGTH
        status = "completed" if is_whole else "incomplete"
        ends = self._pieces(self._reader.finish())
        ends += [self._event(kind, **fields) for kind, fields in self._items.finish(is_whole=is_whole)]
        self._response |= {
            "status": status,
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": self._items.output,
            "usage": _usage(event, self._num_reasoning, is_stored=self._body.is_stored),
            "pacellm": {**report(self._generation.request, event), "session": self.status(event.session)},
        }
        await self._continuation.keep(self._response, self._items.message)
        return [*ends, self._event(f"response.{status}", response=self._response)]


def named(error: RequestError) -> RequestError:
    """The error, its field called as this endpoint calls it."""
    for pattern, name in _NAMES:
        error.param = re.sub(pattern, name, error.param or "").partition(":")[0] or None
        error.message = re.sub(pattern, name, error.message)
    return error


def _shown(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Strict) else value


def _format(body: ResponseRequest) -> Event:
    """The text's form as it was asked for."""
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _usage(event: Finished, reasoning_tokens: int, *, is_stored: bool) -> Event:
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


def _head(continuation: ConversationState, body: ResponseRequest, service: Service, generation: Generation) -> Event:
    """A response that has just begun."""
    sampling, conversation = generation.request.sampling, body.conversation_id
    return {
        "id": continuation.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": service.settings.model_name,
        "output": [],
        "frequency_penalty": sampling.frequency_penalty,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": body.previous_response_id,
        "conversation": None if conversation is None else {"id": conversation},
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.is_stored,
        "temperature": sampling.temperature,
        "text": {"format": _format(body), "verbosity": "medium"},
        "tool_choice": _shown(body.tool_choice) or "auto",
        "tools": [_shown(tool) for tool in body.tools or ()],
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
