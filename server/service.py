"""Requests to the engine and events back, for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import pacellm
from pacellm.calibration.gate import Gate
from pacellm.engine.engine import Engine
from pacellm.engine.fingerprint import system_fingerprint
from pacellm.engine.thread import EngineThread
from pacellm.errors import (
    Aborted,
    DeadlineExceeded,
    Draining,
    EngineDead,
    ModelNotFound,
    Overloaded,
    PaceError,
)
from pacellm.sessions.operation_queue import Operation
from pacellm.text.constraints import Grammar
from pacellm.text.grammar import PROCESSES, Grammars
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Constraint, Event, Failed, Finished, GenerationRequest

from .auth import Caller
from .body_budget import BodyBudget
from .event_queue import EventQueue
from .generation import Generation
from .idempotency import Idempotency
from .metrics import Metrics
from .response_store import Key, ResponseStore
from .schema import RESPONSE_PREFIX
from .settings import Settings
from .thread_pools import ThreadPools

if TYPE_CHECKING:
    from .traces import Traces

logger = logging.getLogger("pacellm.server")
T = TypeVar("T")
_UNFINISHED_SECONDS = 5.0  # that what no client waits for gets at the end


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
        self._unfinished: set[asyncio.Task[None]] = set()
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
        self.fingerprint = system_fingerprint(engine.model, engine.config, pacellm.__version__)
        observers = [self.metrics.observe, *([traces.observe] if traces is not None else [])]
        self._handlers = (*observers, self._route)

    async def start(self) -> None:
        """Start the engine."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self) -> None:
        """End the engine; unfinished requests fail with an error."""
        await asyncio.to_thread(self.thread.stop)
        if self._unfinished:
            await asyncio.wait(self._unfinished, timeout=_UNFINISHED_SECONDS)
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

    def check_turn(self, tenant: str) -> None:
        """Refuse a request of a tenant that could not be queued now, before any work on it. What it is may have it
        refused later.

        Raises:
            Overloaded, Draining, EngineDead: not now.
        """
        self.thread.check_turn()
        limit = self.settings.max_requests_per_key
        if limit is not None and self._count(tenant) >= limit:
            raise Overloaded(
                f"this key has {limit} requests queued or running, its limit", retry_after=1, code="rate_limit_exceeded"
            )

    def submit(self, request: GenerationRequest, caller: Caller, events: EventQueue, number: int = 0) -> Generation:
        """Check and queue a request.

        Args:
            events, number: as for :class:`Generation`.

        Raises:
            PaceError: it is refused, or its deadline has already passed; nothing was queued.
        """
        request = self.engine.check(request)
        self.check_turn(request.tenant)
        if request.session is not None:
            self.check_room(request.session)
        left = self._seconds_left(caller)
        if left is not None:
            if left <= 0:
                raise _late()
            request = dataclasses.replace(request, deadline=time.monotonic() + left)
        self.thread.submit(request)  # its first event needs this loop, so it cannot come before the next line
        if request.session is not None and request.commit and not _is_stored_response(request):
            self._writing[request.request_id] = request.session
        self._generations[request.request_id] = generation = Generation(self, request, caller, events, number)
        if self.traces is not None:
            self.traces.start(request, caller.request_id, caller.traceparent)
        if left is not None:
            generation.deadline = asyncio.get_running_loop().call_later(left, self._end, generation, _late())
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

    def cancel_all(self, tenant: str, request_id: str) -> int:
        """End a tenant's requests with this X-Request-ID or this answer id; how many there were."""
        found = [
            generation
            for generation in self._generations.values()
            if generation.caller.tenant == tenant
            and request_id in (generation.caller.request_id, generation.request.request_id)
        ]
        for generation in found:
            self._end(generation, Aborted("the request was cancelled"))
        return len(found)

    def going(self, tenant: str) -> list[Generation]:
        """A tenant's requests that have not ended, in the order in which they came."""
        return [one for one in self._generations.values() if one.caller.tenant == tenant and not one.has_ended]

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
        return sum(one.caller.tenant == tenant for one in self._generations.values())

    def _end(self, generation: Generation, error: PaceError) -> None:
        """Fail a request from this side; what it held is returned at the engine's next step."""
        if self.traces is not None:
            self.traces.observe(generation.request.request_id, Failed(error))
        if _is_stored_response(generation.request):
            self.cancel(generation)  # it may be complete, and its conversation must know then
        else:
            self.forget(generation, abort=True)
        generation.push(Failed(error))

    def cancel(self, generation: Generation) -> None:
        """Have the engine end a request, which it tells unless the request is complete by then."""
        if generation.deadline is not None:
            generation.deadline.cancel()
        self.thread.abort(generation.request.request_id)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something go on that no client waits for; it ends before the service does."""
        task = asyncio.ensure_future(work)
        self._unfinished.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._unfinished.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.engine.faults.note("delivery", error)

    def forget(self, generation: Generation, *, abort: bool) -> None:
        """Stop routing events to a generation."""
        known = self._generations.pop(generation.request.request_id, None)
        if generation.deadline is not None:
            generation.deadline.cancel()
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
        for request_id, event in events:
            for handle in self._handlers:
                try:
                    handle(request_id, event)
                except Exception as error:
                    self.engine.faults.note("delivery", error)

    def _note_end(self, request_id: str, event: Finished | Failed) -> None:
        """What follows for others from a request's end."""
        written = self._writing.pop(request_id, None)
        if isinstance(event, Failed):
            return
        if written is not None:
            # a conversation's messages are not what its session stands for any more
            self.response_store.drop(written)
        if event.prefill_seconds > 0:
            computed = event.usage.prompt_tokens - event.usage.cached_tokens + event.usage.replayed_tokens
            rate = computed / event.prefill_seconds
            self.prefill_rate = rate if self.prefill_rate is None else 0.7 * self.prefill_rate + 0.3 * rate

    def _route(self, request_id: str, event: Event) -> None:
        """Bring an event to its generation, which must have it whatever its end means for others."""
        generation = self._generations.get(request_id)
        if generation is not None:
            generation.push(event)
            generation.follow(event)
        if isinstance(event, Finished) or isinstance(event, Failed):  # noqa: SIM101, for each token: a union costs more
            if generation is not None:
                generation.has_ended = True
            self._note_end(request_id, event)


def _is_stored_response(request: GenerationRequest) -> bool:
    return request.commit and request.request_id.startswith(RESPONSE_PREFIX)


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the request's deadline passed before its answer was complete")
