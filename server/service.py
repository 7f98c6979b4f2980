"""Requests to the engine and events back, for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pacellm import modes
from pacellm.calibration.gate import Gate
from pacellm.engine.engine import Engine
from pacellm.engine.thread import EngineThread
from pacellm.errors import (
    Aborted,
    DeadlineExceeded,
    Draining,
    EngineDead,
    ModelNotFound,
    Overloaded,
    PaceError,
    RequestError,
    UnsupportedParameter,
)
from pacellm.sessions.operations import Operation
from pacellm.text.constraints import Grammar
from pacellm.text.grammar import PROCESSES, Grammars
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Admitted, Constraint, Event, Failed, Finished, GenerationRequest, SamplingParams

from .api.chat.schema import ChatCompletionRequest
from .api.fields import GenerationFields, SamplingFields
from .auth import Caller
from .body_budget import BodyBudget
from .event_queue import EventQueue
from .idempotency import Idempotency
from .metrics import Metrics
from .reading.chat_input import ChatInput
from .reading.chat_prompt import ChatPrompt, RenderedChat
from .response_store import Key, ResponseStore
from .schema import RESPONSE_PREFIX
from .settings import Settings
from .thread_pools import ThreadPools

if TYPE_CHECKING:
    from .traces import Traces

logger = logging.getLogger("pacellm.server")
T = TypeVar("T")


class Generation:
    """A submitted request's events, as they come. Iterate it to its end, or close it: that cancels the request."""

    def __init__(self, service: Service, request: GenerationRequest, caller: Caller | None = None) -> None:
        self.request, self.caller = request, caller
        self._service = service
        self.timer: asyncio.TimerHandle | None = None
        self._inbox = EventQueue()
        self._first: Event | None = None
        self._ended = False

    def push(self, event: Event) -> None:
        """Called on the event loop."""
        self._inbox.push(event)

    async def admitted(self, timeout: float) -> Admitted | None:
        """What admission found, or None where the request is still queued after ``timeout`` seconds.

        Raises:
            PaceError: the request failed before it was admitted.
        """
        self._first = await self._inbox.get(timeout)
        if isinstance(self._first, Failed):
            raise self._first.error
        return self._first if isinstance(self._first, Admitted) else None

    async def events(self, timeout: float | None = None) -> AsyncIterator[Event | None]:
        """Every event; None after ``timeout`` seconds of silence."""
        while not self._ended:
            event, self._first = self._first, None
            if event is None:
                event = await self._inbox.get(timeout)
            self._ended = isinstance(event, Finished | Failed)
            yield event

    def close(self) -> None:
        """Forget the request; cancel it where it has not ended."""
        self._inbox.close()
        self._service.forget(self, abort=not self._ended)


class Service:
    """The engine, its tokenizer and the running generations.

    Args:
        engine: not yet running.
        tokenizer: of the same model.
        settings: of the HTTP side.
        traces: gets a span of every request; None makes none.
        gate: what requests may ask for; None lets them ask for everything.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        settings: Settings,
        traces: Traces | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.settings, self.gate = engine, tokenizer, settings, gate
        self.thread = EngineThread(engine, self._deliver)
        self.metrics, self.traces = Metrics(self.thread, settings.model_name), traces
        self.grammars = Grammars(tokenizer.backend, frozenset(engine.model.eos_token_ids))
        self.pools = ThreadPools(PROCESSES)
        self._generations: dict[str, Generation] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.bodies, self.snapshots = (
            BodyBudget(8 * settings.max_body_bytes),
            BodyBudget(2 * settings.max_snapshot_bytes),
        )
        self.idempotency = Idempotency()
        self.response_store = ResponseStore(
            settings.response_memory, settings.response_ttl, self.delete_later, tokenizer.forget
        )
        self.conversations: set[Key] = set()  # those of which a response is being made
        self._writing: dict[str, Key] = {}  # by request, sessions that others than responses commit to
        self.prefill_rate: float | None = None  # tokens per second, of late
        self.created = int(time.time())

    async def start(self) -> None:
        """Start the engine."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self) -> None:
        """End the engine; unfinished requests fail with an error."""
        await asyncio.to_thread(self.thread.stop)
        self.pools.close()
        await asyncio.to_thread(self.grammars.close)
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)

    async def off_loop(self, function: Callable[..., T], *arguments: Any, size: int | None = None, key: str = "") -> T:
        """Run slow work in a thread.

        Args:
            size: characters or tokens that it works on; None: many.
            key: whose it is. Keys take turns.
        """
        pool = self.pools.long if size is None else self.pools.of(size)
        return await pool.run(key, functools.partial(function, *arguments))

    async def operate(self, operation: Operation) -> Any:
        """Run a session operation in the engine thread.

        Raises:
            PaceError: it is refused.
        """
        return await asyncio.wrap_future(self.thread.call(operation))

    def delete_later(self, session: Key) -> None:
        """Delete a session that nobody waits for."""
        with contextlib.suppress(EngineDead):
            self.thread.call(self.engine.ops.delete(session))

    async def submit_chat(
        self, body: ChatCompletionRequest, caller: Caller, session_id: str | None
    ) -> tuple[Generation, ChatPrompt]:
        """Render, tokenise, check and queue a chat request.

        Raises:
            PaceError: it is refused; nothing was queued.
        """
        self.check_options(body, session_id)
        scope = None if session_id is None else f"{caller.tenant}/{session_id}"
        session = None if session_id is None else (caller.tenant, session_id)
        turn = await self.turn(body.turn, body.sampling(), scope, session, caller)
        request = self.request("chatcmpl", body, turn.prompt, turn.sampling, caller, session_id, body.n or 1)
        constraint = await self.compile(turn.grammar, caller.tenant)
        continues = body.continue_final_message and constraint is None  # a form holds for the answer by itself
        request = dataclasses.replace(
            request, constraint=constraint, outline=turn.outline, append=turn.append, continues=continues
        )
        return await self.submit(request, caller), turn

    async def turn(
        self,
        asked: Callable[[], ChatInput],
        sampling: SamplingParams,
        scope: str | None,
        session: Key | None,
        caller: Caller,
        size: int = 0,
    ) -> ChatPrompt:
        """What a conversation comes to.

        Args:
            asked: called off the event loop.
            scope: as for :meth:`RenderedChat.turn`.
            session: that it goes on.
            caller: who asks.
            size: characters of the conversation that are not in the caller's body.

        Raises:
            RequestError: names the field.
        """
        tenant, limit = caller.tenant, self.engine.config.max_model_len
        draft = await self.off_loop(
            lambda: RenderedChat(self.tokenizer, self.grammars, asked(), limit), size=caller.size + size, key=tenant
        )
        logged = None
        if session is not None and draft.needs_log:
            logged = await self.operate(self.engine.ops.context(session))
        return await self.off_loop(draft.turn, sampling, scope, logged, size=draft.size, key=tenant)

    async def compile(self, grammar: Grammar | None, key: str) -> Constraint | None:
        """What an answer must look like, for the engine.

        Args:
            key: who asks. Keys take turns.

        Raises:
            RequestError: it is wrong or too complex; names the field.
        """
        if grammar is None:
            return None
        known = self.grammars.known(grammar)
        if known is not None:
            return known
        return await self.pools.grammars.run(key, functools.partial(self.grammars.compile, grammar))

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name.

        Raises:
            ModelNotFound: it is not the one served.
        """
        if name is not None and name != self.settings.model_name:
            raise ModelNotFound(
                f"model {name!r} is not served here; this server has {self.settings.model_name!r}", param="model"
            )

    def check_options(self, body: SamplingFields, session_id: str | None) -> None:
        """Refuse what this server does not do, before any work.

        Raises:
            RequestError: names the field.
        """
        self.check_generation(body)
        if body.truncate_prompt_tokens is not None and session_id is not None:
            raise RequestError("a session's prompt cannot be truncated", param="truncate_prompt_tokens")
        if body.pacellm.append and session_id is None:
            raise RequestError("pacellm.append needs a session: name one with session_id or X-Session-ID",
                               param="pacellm.append", code="invalid_value")  # fmt: skip

    def check_generation(self, body: GenerationFields) -> None:
        """Refuse another model, banks where there are none, and what would make answers worse unasked.

        Raises:
            RequestError: names the field.
        """
        self.check_model(body.model)
        if body.pacellm.pa not in (None, "off") and not self.engine.config.pa:
            raise UnsupportedParameter("this server runs with --no-pa", param="pacellm.pa")
        if self.gate is not None:
            config = self.engine.config
            mode = modes.resolve(body.pacellm.pa or "on", config.bank.preset) if config.pa else "off"
            self.gate.check_request(modes.preset_of(mode), body.pacellm.ce_density)

    def request(
        self,
        kind: str,
        body: SamplingFields,
        prompt: list[int],
        sampling: SamplingParams,
        caller: Caller,
        session_id: str | None,
        n: int = 1,
    ) -> GenerationRequest:
        """The engine's request; its id begins with ``kind``."""
        return GenerationRequest(
            request_id=f"{kind}-{uuid.uuid4().hex}",
            prompt=prompt if body.truncate_prompt_tokens is None else prompt[-body.truncate_prompt_tokens :],
            sampling=sampling,
            session=None if session_id is None else (caller.tenant, session_id),
            tenant=caller.tenant,
            n=n,
            pa=body.pacellm.pa or "on",
            commit=body.pacellm.commit,
            ce_density=body.pacellm.ce_density,
            experts=body.pacellm.experts,
            priority=body.priority,
        )

    async def submit(self, request: GenerationRequest, caller: Caller) -> Generation:
        """Check and queue a request.

        Raises:
            PaceError: it is refused, or its deadline has already passed; nothing was queued.
        """
        request = await self.off_loop(self.engine.check, request, size=len(request.prompt), key=caller.tenant)
        limit = self.settings.max_requests_per_key
        if limit is not None and self._count(caller.tenant) >= limit:
            raise Overloaded(
                f"this key has {limit} requests queued or running, its limit", retry_after=1, code="rate_limit_exceeded"
            )
        if request.session is not None:
            self.check_room(request.session)
        left = self._seconds_left(caller)
        if left is not None:
            if left <= 0:
                raise _late()
            request = dataclasses.replace(request, deadline=time.monotonic() + left)
        self.thread.submit(request)  # its first event needs this loop, so it cannot come before the next line
        if request.session is not None and request.commit and not request.request_id.startswith(RESPONSE_PREFIX):
            self._writing[request.request_id] = request.session
        self._generations[request.request_id] = generation = Generation(self, request, caller)
        if self.traces is not None:
            self.traces.start(request, caller.request_id, caller.traceparent)
        if left is not None:
            generation.timer = asyncio.get_running_loop().call_later(left, self._end, generation, _late())
        return generation

    def drain(self) -> None:
        """Take no new requests; those submitted run to their end."""
        self.thread.drain()

    def end_all(self) -> None:
        """Fail what still runs or waits because the server ends."""
        for generation in list(self._generations.values()):
            self._end(generation, Draining("the server is shutting down"))

    def check_room(self, session: Key) -> None:
        """Refuse a session that would be one too many of its tenant's. Stored responses have a budget of their own.

        Raises:
            Overloaded: it would.
        """
        (tenant, name), limit = session, self.settings.max_sessions_per_key
        if limit is None or name.startswith(RESPONSE_PREFIX) or self.engine.sessions.get(session) is not None:
            return
        if self.engine.sessions.count(tenant) - self.response_store.count(tenant) >= limit:
            raise Overloaded(
                f"this key has {limit:,} sessions, its limit; delete some", retry_after=60, code="too_many_sessions"
            )

    def cancel(self, tenant: str, request_id: str) -> int:
        """End a tenant's requests with this X-Request-ID or this answer id; how many there were."""
        found = [
            generation
            for generation in self._generations.values()
            if generation.caller is not None
            and generation.caller.tenant == tenant
            and request_id in (generation.caller.request_id, generation.request.request_id)
        ]
        for generation in found:
            self._end(generation, Aborted("the request was cancelled"))
        return len(found)

    def place(self, generation: Generation) -> dict[str, int | None] | None:
        """Where a queued request stands: requests and prompt tokens before it, and the milliseconds until its turn as
        far as the rate of earlier prefills tells; None where it is not queued."""
        ahead = self.thread.ahead_of(generation.request.request_id)
        if ahead is None:
            return None
        pending = ahead[1] + self.engine.pending_tokens
        rate = self.prefill_rate
        return {
            "position": ahead[0] + 1,
            "prompt_tokens_ahead": pending,
            "estimated_ms": round(1000 * pending / rate) if rate else None,
        }

    def _seconds_left(self, caller: Caller) -> float | None:
        limits = [limit for limit in (caller.timeout, self.settings.request_timeout) if limit is not None]
        return caller.arrival + min(limits) - time.monotonic() if limits else None

    def _count(self, tenant: str) -> int:
        return sum(one.caller is not None and one.caller.tenant == tenant for one in self._generations.values())

    def _end(self, generation: Generation, error: PaceError) -> None:
        """Fail a request from this side; what it held is returned at the engine's next step."""
        if self.traces is not None:
            self.traces.observe(generation.request.request_id, Failed(error))
        self.forget(generation, abort=True)
        generation.push(Failed(error))

    def forget(self, generation: Generation, *, abort: bool) -> None:
        """Stop routing events to a generation."""
        known = self._generations.pop(generation.request.request_id, None)
        if generation.timer is not None:
            generation.timer.cancel()
        if abort and known is not None:
            self.thread.abort(generation.request.request_id)
            if self.traces is not None:
                self.traces.fail(generation.request.request_id, "cancelled")

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        """Called in the engine thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[tuple[str, Event]]) -> None:
        """On the event loop: every event reaches its request, whatever goes wrong with those before it."""
        survived = self.engine.faults.survived
        for request_id, event in events:
            with survived("delivery"):
                self.metrics.observe(request_id, event)
            if self.traces is not None:
                with survived("delivery"):
                    self.traces.observe(request_id, event)
            if isinstance(event, Finished | Failed):
                with survived("delivery"):
                    self._has_ended(request_id, event)
            generation = self._generations.get(request_id)
            if generation is not None:
                with survived("delivery"):
                    generation.push(event)

    def _has_ended(self, request_id: str, event: Finished | Failed) -> None:
        written = self._writing.pop(request_id, None)
        if isinstance(event, Failed):
            return
        if written is not None:
            self.response_store.drop(written)  # a conversation's messages are not what its session stands for any more
        if event.prefill_seconds > 0:
            computed = event.usage.prompt_tokens - event.usage.cached_tokens + event.usage.replayed_tokens
            rate = computed / event.prefill_seconds
            self.prefill_rate = rate if self.prefill_rate is None else 0.7 * self.prefill_rate + 0.3 * rate


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the request's deadline passed before its answer was complete")
