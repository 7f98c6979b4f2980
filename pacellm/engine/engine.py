"""The engine: requests in, events out, one step at a time. Single-threaded; ``thread.py`` gives it a thread.

A step is: schedule, run, commit. Whatever fails inside a step fails one request; the others of the step start
again from their sessions' states, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tokenizers import Tokenizer

from pacellm.config import EngineConfig
from pacellm.engine import factory
from pacellm.engine.integrity import IntegrityError
from pacellm.engine.request_state import new_request
from pacellm.engine.stats import per_layer
from pacellm.engine.validation import limit_of, tokens_to_generate
from pacellm.errors import PaceError, RequestError
from pacellm.model.load import LoadedModel
from pacellm.sessions.operation_queue import Operation
from pacellm.sessions.records import Records
from pacellm.text.detokenizer import Vocabulary
from pacellm.types import Event, GenerationRequest


class Engine:
    """Runs requests on one model.

    Args:
        model: from ``pacellm.model.load``; patched here where the config says so.
        config: limits; what is None is filled in from the model and the machine.
        tokenizer: backend for the answers' text; None gives ids only.

    Attributes:
        ops, snapshots: what clients do to sessions; both make operations for :meth:`call`.
        wakeup: notified when there is news from the worker; whoever gives the engine a thread waits for it.

    Raises:
        ConfigError: the config does not fit the model.
        ModelError: the model cannot be patched.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.parts = parts = factory.build(model, config or EngineConfig(), tokenizer)
        self.model, self.config = model, parts.device.config
        self.kernel, self.products = parts.device.kernel, parts.device.products
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self.allocator, self.pool, self.runner = parts.device.allocator, parts.device.pool, parts.device.runner
        self.num_blocks, self.block_bytes = self.allocator.num_blocks, parts.device.block_bytes
        self.sessions, self.worker = parts.sessions.store, parts.sessions.worker
        self.mover, self.eviction = parts.sessions.mover, parts.sessions.eviction
        self.scheduler, self.prefix_cache = parts.scheduling.scheduler, parts.scheduling.prefix_cache
        self.ops, self.snapshots = parts.operating.sessions, parts.operating.snapshots
        self.requests, self.stats, self.faults, self.wakeup = parts.requests, parts.stats, parts.faults, parts.wakeup
        self._operations, self._outbox = parts.operating.queue, parts.outbox

    @property
    def records(self) -> Records:
        """How sessions of this model and config are written; the weights are hashed when first asked.

        Raises:
            RequestError: the model is split over processes.
        """
        if self.parts.records is None:
            raise RequestError("sessions are not written, so there are no snapshots, with tensor_parallel_size",
                               code="snapshots_unsupported")  # fmt: skip
        return self.parts.records()

    def close(self) -> None:
        """Write every session out and let the session directory go; the engine runs nothing more."""
        self.mover.save_all()
        self.worker.close()
        if self.mover.disk is not None:
            self.mover.disk.close()

    # -- what there is to do -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A request is queued or running, or an operation waits."""
        return bool(self.requests) or self._operations.is_waiting

    @property
    def has_expired(self) -> bool:
        """A session's time may have come."""
        return self.sessions.may_expire

    @property
    def has_news(self) -> bool:
        """The worker has results to take."""
        return self.worker.has_results

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens that running requests have yet to feed; a glimpse, any thread may take it."""
        return sum(sequence.pending for sequence in list(self.scheduler.running) if not sequence.is_decoding)

    def expert_activity(self) -> dict[int, list[float]]:
        """By layer, tokens of prompts by expert: each token counts 1, shared by squared activations. Of requests that
        finished, since the start; {} without a layout. Any thread may call this."""
        return per_layer(self.stats.experts)

    # -- requests and operations ---------------------------------------------------------------------------

    def check(self, request: GenerationRequest) -> GenerationRequest:
        """The request as :meth:`add` takes it without another look. Touches nothing, so any thread may call it.

        Raises:
            RequestError: it can never run; names the field.
        """
        return self.parts.validator.check(request)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never run, or its id is in use.
            Overloaded, DeadlineExceeded: it would miss its deadline.
        """
        request = request if request.is_checked else self.check(request)
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        limit = limit_of(request, self.config)
        most = tokens_to_generate(len(request.prompt), request.sampling.max_tokens, limit, self.config.longest_answer)
        state = new_request(request, most, self._vocabulary)
        self.scheduler.deadlines.check(state.sequence)
        self.requests[request.request_id] = state
        self.scheduler.add(state.sequence)

    def abort(self, request_id: str) -> bool:
        """Take a request out wherever it is; False where it has already ended. Its session stays as it was."""
        state = self.requests.get(request_id)
        if state is None or state.is_recorded or state.index:  # a choice is no request
            return False
        self.stats.aborted += 1
        self.parts.recovery.take_out(state, keep=True)
        return True

    def call(self, operation: Operation, future: Future[Any] | None = None) -> Future[Any]:
        """Run an operation at the next step, and again until it ends; the future gets what it gives."""
        return self._operations.submit(operation, future)

    def end_calls(self, error: PaceError) -> None:
        """The engine runs no more: operations that wait end with an error."""
        self._operations.end(error)

    # -- the step ------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[str, Event]]:
        """Schedule, run, commit. Returns what happened, by request id; nothing where nothing could run.

        A failure that belongs to no request and no operation ends every request, and the engine goes on.

        Raises:
            IntegrityError: memory does not add up, so nothing that is served from it could be trusted.
        """
        parts = self.parts
        try:
            parts.background.run()
            step = parts.dispatcher.next_step(parts.executor.step_ahead)
            flight = parts.executor.run(step)
            if flight is not None:
                parts.committer.commit(flight)
                parts.executor.landed(flight)
        except IntegrityError:
            raise
        except Exception as error:
            parts.executor.forget_ahead()
            parts.recovery.survive(error)
        return self._outbox.take()


def run_until_idle(engine: Engine, on_event: Callable[[str, Event], None] | None = None) -> dict[str, list[Event]]:
    """Step until nothing is left to do; every request's events, in order. For tests and tools."""
    events: dict[str, list[Event]] = {}
    while engine.has_work or engine.worker.num_open:
        for request_id, event in engine.step():
            events.setdefault(request_id, []).append(event)
            if on_event is not None:
                on_event(request_id, event)
    return events
