"""Requests to the engine and events back, for the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pacellm.engine.engine import Engine
from pacellm.engine.session_ops import Operation
from pacellm.engine.thread import EngineThread
from pacellm.errors import ModelNotFound, RequestError, UnsupportedParameter
from pacellm.tokenizer import ChatTokenizer
from pacellm.types import Admitted, Event, Failed, Finished, GenerationRequest
from server.metrics import Metrics
from server.schema import ChatCompletionRequest
from server.settings import Settings

logger = logging.getLogger("pacellm.server")


class Generation:
    """A submitted request's events, as they come. Iterate it to its end, or close it: that cancels the request."""

    def __init__(self, service: Service, request: GenerationRequest) -> None:
        self.request = request
        self._service = service
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._first: Event | None = None
        self._ended = False

    def push(self, event: Event) -> None:
        """Called on the event loop."""
        self._events.put_nowait(event)

    async def admitted(self, timeout: float) -> Admitted | None:
        """What admission found, or None where the request is still queued after ``timeout`` seconds.

        Raises:
            PaceError: the request failed before it was admitted.
        """
        self._first = await self._next(timeout)
        if isinstance(self._first, Failed):
            raise self._first.error
        return self._first if isinstance(self._first, Admitted) else None

    async def _next(self, timeout: float | None) -> Event | None:
        # not asyncio.wait_for: where an event and a cancellation come together, Python 3.11's drops the cancellation
        try:
            async with asyncio.timeout(timeout):
                return await self._events.get()
        except TimeoutError:
            return None

    async def events(self, timeout: float | None = None) -> AsyncIterator[Event | None]:
        """Every event; None after ``timeout`` seconds of silence."""
        while not self._ended:
            if self._first is not None:
                event: Event | None = self._first
                self._first = None
            else:
                event = await self._next(timeout)
            self._ended = isinstance(event, Finished | Failed)
            yield event

    def close(self) -> None:
        """Forget the request; cancel it where it has not ended."""
        self._service.forget(self, abort=not self._ended)


class Service:
    """The engine, its tokenizer and the running generations.

    Args:
        engine: not yet running.
        tokenizer: of the same model.
        settings: of the HTTP side.
    """

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.thread = EngineThread(engine, self._deliver)
        self.metrics = Metrics(self.thread, settings.model_name)
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pacellm-tokenizer")
        self._generations: dict[str, Generation] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.created = int(time.time())

    async def start(self) -> None:
        """Start the engine."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self) -> None:
        """End the engine; unfinished requests fail with an error."""
        await asyncio.to_thread(self.thread.stop)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def off_loop(self, function, *arguments):
        """Run slow work in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def operate(self, operation: Operation) -> Any:
        """Run a session operation in the engine thread.

        Raises:
            PaceError: it is refused.
        """
        return await asyncio.wrap_future(self.thread.call(operation))

    async def submit(self, body: ChatCompletionRequest, session_id: str | None, tenant: str) -> Generation:
        """Render, tokenise, check and queue a chat request.

        Raises:
            PaceError: it is refused; nothing was queued.
        """
        if body.model is not None and body.model != self.settings.model_name:
            raise ModelNotFound(
                f"model {body.model!r} is not served here; this server has {self.settings.model_name!r}", param="model"
            )
        if body.pacellm.pa in ("on", "read_only") and not self.engine.config.pa:
            raise UnsupportedParameter("this server runs with --no-pa", param="pacellm.pa")
        sampling = body.sampling()
        prompt = await self.off_loop(self._encode, body, session_id, tenant)
        request = GenerationRequest(
            request_id=f"chatcmpl-{uuid.uuid4().hex}",
            prompt=prompt,
            sampling=sampling,
            session=None if session_id is None else (tenant, session_id),
            tenant=tenant,
            n=body.n or 1,
            pa=body.pacellm.pa or "on",
            commit=body.pacellm.commit,
        )
        await self.off_loop(self.engine.check, request)  # it walks the prompt
        self.thread.submit(request)  # its first event needs this loop, so it cannot come before the next line
        self._generations[request.request_id] = generation = Generation(self, request)
        return generation

    def _encode(self, body: ChatCompletionRequest, session_id: str | None, tenant: str) -> list[int]:
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        for number, message in enumerate(messages):
            try:
                message["content"].encode()
            except UnicodeEncodeError:
                raise RequestError("text has unpaired surrogates", param=f"messages.{number}.content") from None
        scope = None if session_id is None else f"{tenant}/{session_id}"
        return self.tokenizer.encode(
            self.tokenizer.render(messages), limit=self.engine.config.max_model_len, scope=scope
        )

    def forget(self, generation: Generation, *, abort: bool) -> None:
        """Stop routing events to a generation."""
        known = self._generations.pop(generation.request.request_id, None)
        if abort and known is not None:
            self.thread.abort(generation.request.request_id)

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        """Called in the engine thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[tuple[str, Event]]) -> None:
        for request_id, event in events:
            self.metrics.observe(request_id, event)
            generation = self._generations.get(request_id)
            if generation is not None:
                generation.push(event)
