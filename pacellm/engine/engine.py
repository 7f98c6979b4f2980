"""The engine: requests in, events out, one step at a time. Single-threaded; ``thread.py`` gives it a thread.

A step is: schedule, run, commit. Whatever fails inside a step fails one request; the others of the step start
again from their sessions' states, with the same result.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import time
from array import array
from collections.abc import Callable

from tokenizers import Tokenizer

from pacellm.config import EngineConfig
from pacellm.engine import factory
from pacellm.engine.answer import Answers
from pacellm.engine.checks import check
from pacellm.engine.integrity import IntegrityError, check_integrity
from pacellm.engine.recovery import Recovery
from pacellm.engine.request_state import Live
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.sequence import Sequence
from pacellm.engine.stats import EngineStats, per_layer
from pacellm.engine.step import Copy, Step, Work
from pacellm.errors import EngineError, PaceError, RequestError, reason
from pacellm.experts.forward import check_density, detach
from pacellm.faults import Faults
from pacellm.kv.blocks import BLOCK, BlockAllocator
from pacellm.model.fused import fuse
from pacellm.model.load import LoadedModel
from pacellm.model.patch import unpatch
from pacellm.run.ahead import Flight, step_after
from pacellm.run.runner import StepFailed
from pacellm.sessions.disk import Disk
from pacellm.sessions.mover import Mover
from pacellm.sessions.operations import SessionOps
from pacellm.sessions.records import Records
from pacellm.sessions.session import Key
from pacellm.sessions.snapshots import SnapshotOps
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker
from pacellm.text.detokenizer import Vocabulary
from pacellm.text.stream import TextStream
from pacellm.types import (
    Admitted,
    Event,
    GenerationRequest,
    Progress,
)

logger = logging.getLogger("pacellm.engine")
_WAIT = 0.002  # seconds that a step waits for the worker where nothing else can run


class Engine:
    """Runs requests on one model.

    Args:
        model: from ``pacellm.model.load``; patched here where the config says so.
        config: limits; what is None is filled in from the model and the machine.
        tokenizer: backend for the answers' text; None gives ids only.

    Raises:
        ConfigError: the config does not fit the model.
        ModelError: the model cannot be patched.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        detach(model.module)
        unpatch(model.module)
        if model.ranks is None:
            fuse(model.module, joins=not (config or EngineConfig()).deterministic)
        if model.ranks is not None:
            factory.check_parallel(config or EngineConfig())
        check_density((config or EngineConfig()).ce_density, model.module, model.layout, "ce_density")
        self.model, self.tokenizer = model, tokenizer
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self.kernel = factory.attention_kernel(model, config or EngineConfig())
        self.products = factory.products(model, config or EngineConfig())
        self.config = factory.resolve(model, config or EngineConfig())
        self.block_bytes = BLOCK * model.bytes_per_token
        self.num_blocks = (self.config.kv_cache_memory or 0) // self.block_bytes
        self.allocator = BlockAllocator(self.num_blocks)
        self.pool = factory.new_pool(model, self.config) if self.config.pa or model.layout is not None else None
        self.sessions = SessionStore(
            self.allocator,
            self.pool,
            block_bytes=self.block_bytes,
            memory=self.config.session_memory or 0,
            max_rows=self.pool.num_rows - self.config.max_num_seqs if self.pool is not None else 0,
            ttl=self.config.session_ttl,
            log_memory=self.config.session_log_memory,
            # a folded session's banks leave the device, which those of a tensor-parallel model cannot
            fold_after=4 * (self.config.max_model_len or 0) if model.ranks is None else sys.maxsize,
        )
        self.scheduler = Scheduler(self.config, self.allocator, self.sessions, self.pool)
        self.runner = factory.new_runner(
            model, self.pool, self.num_blocks, self.config, self.kernel, self.products.rows
        )
        self.scheduler.room.copy_now = self.runner.copy
        self.stats, self.faults = EngineStats(), Faults()
        # its thread must not keep an engine that nobody else keeps
        self.worker = Worker(functools.partial(self.faults.note, "worker"))
        self._records: Records | None = None
        directory = self.config.session_dir
        disk = Disk(directory, sync=self.config.session_sync) if directory is not None else None
        self.mover = self.scheduler.mover = Mover(
            self.sessions,
            self.allocator,
            self.pool,
            self.runner.slabs,
            self.worker,
            host_memory=factory.host_memory(model, self.config),
            disk=disk,
            records=self.records if disk is not None else None,
            disk_size=self.config.session_disk_size,
            bytes_per_token=model.bytes_per_token,
        )
        if self.mover.files is not None:
            self.mover.files.find()
        self.answers, self.recovery = Answers(self), Recovery(self)
        self.ops = SessionOps(self)
        self.snapshots = SnapshotOps(self, self.ops)
        self.live: dict[str, Live] = {}
        self._ahead: Flight | None = None  # the next step, where it was launched before its tokens were known
        self._ended = 0.0  # when the last step had
        self.late: list[tuple[str, Event]] = []  # of this step, from what the worker and operations brought

    @property
    def records(self) -> Records:
        """How sessions of this model and config are written; the weights are hashed when first asked.

        Raises:
            RequestError: the model is split over processes.
        """
        if self.model.ranks is not None:
            raise RequestError("sessions are not written, so there are no snapshots, with tensor_parallel_size",
                               code="snapshots_unsupported")  # fmt: skip
        if self._records is None:
            self._records = Records(
                factory.fingerprint_of(self.model, self.config, self.tokenizer),
                vocab_size=self.model.vocab_size,
                slabs=self.runner.slabs,
                like=self.pool.banks(0) if self.pool is not None else {},
                max_tokens=self.config.max_model_len or 0,
                former=lambda: factory.former_fingerprints(self.model, self.config, self.tokenizer),
            )
        return self._records

    def close(self) -> None:
        """Write every session out and let the session directory go; the engine runs nothing more."""
        self.mover.save_all()
        self.worker.close()
        if self.mover.disk is not None:
            self.mover.disk.close()

    # -- requests ------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A request is queued or running, or a session operation waits."""
        return bool(self.live) or self.ops.is_waiting

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

    def check(self, request: GenerationRequest) -> GenerationRequest:
        """The request as :meth:`add` takes it without another look. Touches nothing, so any thread may call it.

        Raises:
            RequestError: it can never run; names the field.
        """
        return check(request, self)

    def expert_activity(self) -> dict[int, list[float]]:
        """By layer, tokens of prompts by expert: each token counts 1, shared by squared activations. Of requests that
        finished, since the start; {} without a layout. Any thread may call this."""
        return per_layer(self.stats.experts)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never run, or its id is in use.
            Overloaded, DeadlineExceeded: it would miss its deadline.
        """
        request = request if request.is_checked else self.check(request)
        if request.request_id in self.live:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        room = (self.config.max_model_len or 0) - len(request.prompt)
        asked, seed = request.sampling.max_tokens, request.sampling.seed
        sequence = Sequence(
            request=request,
            prompt=array("i", request.prompt),
            max_tokens=room if asked is None else asked,
            seed=int.from_bytes(os.urandom(8), "little") if seed is None else seed,
            tools=request.outline.tools,
        )
        self.scheduler.deadlines.check(sequence)
        live = self.live[sequence.id] = Live(sequence, self._new_text(request))
        self.scheduler.add(sequence)
        if request.n > 1:
            live.choices = [live, *(self._choice(live, index) for index in range(1, request.n))]
            sequence.num_branches = request.n - 1

    def _new_text(self, request: GenerationRequest) -> TextStream | None:
        if self._vocabulary is None:
            return None
        sampling = request.sampling
        return TextStream(
            self._vocabulary, sampling.stop, skip_special=sampling.skip_special_tokens, is_start=not request.continues
        )

    def _choice(self, first: Live, index: int) -> Live:
        """A further choice, with a seed of its own that follows from the request's."""
        request = first.sequence.request
        sequence = Sequence(
            request=dataclasses.replace(request, request_id=f"{request.request_id}#{index}", commit=False, n=1),
            prompt=first.sequence.prompt,
            max_tokens=first.sequence.max_tokens,
            seed=(first.sequence.seed + index) % 2**63,
            is_branch=True,
        )
        return Live(sequence, self._new_text(request), index=index)

    def abort(self, request_id: str) -> bool:
        """Take a request out wherever it is; False where it has already ended. Its session stays as it was."""
        live = self.live.get(request_id)
        if live is None or live.is_recorded:
            return False
        if live.index:
            return False  # a choice is no request
        self.stats.aborted += 1
        self.recovery.take_out(live, keep=True)
        return True

    # -- the step ------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[str, Event]]:
        """Schedule, run, commit. Returns what happened, by request id; nothing where nothing could run.

        A failure that belongs to no request and no operation ends every request, and the engine goes on.

        Raises:
            IntegrityError: memory does not add up, so nothing that is served from it could be trusted.
        """
        try:
            self._step()
        except IntegrityError:
            raise
        except Exception as error:
            self._ahead = None
            self.recovery.survive(error)
        events, self.late = self.late, []
        return events

    def _step(self) -> None:
        """A step, whose events go to ``late``."""
        self.worker.poll()
        for session in self.sessions.expired():
            with self.faults.survived("expiry"):
                self.ops.expire(session)
        if self.mover.files is not None:
            self.mover.files.tend()
        self.ops.run()
        flight, self._ahead = self._ahead, None
        preempted = self.scheduler.preemptions
        step = self._scheduled() if flight is None else flight.step
        refused = self._refused()
        self.late += refused + self._admissions()
        if step is None:
            if self.worker.num_open:
                self.worker.wait(_WAIT)
            elif not refused and self.scheduler.preemptions == preempted:  # else there is room now for those behind
                self.late += self._stuck()
            return
        parts = [(work.position, work.count) for work in step.work if not work.sequence.is_decoding]
        flight = flight or self._run(step)
        if flight is None:
            return
        broken = self._run_ahead(flight)
        self._commit(flight)
        if broken is not None:
            self._start_again(broken)
        # a device has done its work when tokens were sampled, not when the forward pass returned
        ended, before = time.monotonic(), self._ended
        self.scheduler.pace.observe(len(step.work) - len(parts), parts, ended - max(flight.started, before))
        self._ended = ended

    def _scheduled(self) -> Step | None:
        try:
            return self.scheduler.schedule()
        except Exception as error:
            if self.scheduler.considered is None:
                raise
            self.recovery.admission_failed(self.scheduler.considered, error)
            return None

    def _run(self, step: Step) -> Flight | None:
        """The forward pass and the tokens it gives; None where it failed, which one request pays for."""
        started = time.monotonic()
        try:
            output = self.runner.run(step)
            return Flight(step, output, self.answers.choose(output), started)
        except StepFailed as error:
            self.late.append(self.recovery.step_failed(step, error))
        except Exception as error:
            failed = StepFailed(f"{type(error).__name__}: {reason(error)}", None)
            failed.__cause__ = error
            self.late.append(self.recovery.step_failed(step, failed))
        return None

    def _run_ahead(self, flight: Flight) -> Step | None:
        """Launch the next step before this one's tokens are read, where nothing else is to be done; a step that failed
        is given back."""
        if not self.config.async_scheduling or self.runner.decoder is None:
            return None
        if self.scheduler.waiting or self.ops.is_waiting:
            return None
        step = step_after(flight.step, len(self.scheduler.running), self.model.eos_token_ids)
        if step is None:
            return None
        started = time.monotonic()
        try:
            output = self.runner.run_ahead(step, flight.chosen.tokens)
        except StepFailed as error:
            logger.warning("a step ahead failed: %s", error, exc_info=error.__cause__)
            return step
        if output is not None:
            self._ahead = Flight(step, output, self.answers.choose(output), started)
            self.stats.steps_ahead += 1
        return None

    def _start_again(self, step: Step) -> None:
        """Those of a failed step that still run feed their tokens anew, from their sessions' states."""
        for work in reversed(step.work):
            if work.sequence.is_running:
                self.scheduler.preempt(work.sequence)

    def _admissions(self) -> list[tuple[str, Event]]:
        admitted, self.scheduler.admitted = self.scheduler.admitted, []
        return [
            (sequence.id, Admitted(sequence.session_status, sequence.cached, sequence.kinship)) for sequence in admitted
        ]

    def _commit(self, flight: Flight) -> None:
        events, failed = self.answers.scores(flight.output)
        self.late += events
        rows = {sequence.id: row for row, sequence in enumerate(flight.output.sampled)}
        self.stats.steps += 1
        for work in flight.step.work:
            sequence = work.sequence
            if not sequence.is_running:
                continue  # it ended meanwhile; a failed choice takes the others along
            try:
                self._advance(work)
                if sequence.id in failed:
                    self.late.append(self.fail(sequence, failed[sequence.id]))
                elif sequence.id in rows:
                    logits = flight.output.logits[rows[sequence.id]]
                    self.late += self.answers.sample(sequence, logits, flight.chosen)
            except Exception as error:
                self.faults.note("commit", error)
                self.late.append(self.fail(sequence, EngineError(f"the request failed: {reason(error)}")))
        if self.config.check_integrity:
            check_integrity(self)

    def _advance(self, work: Work) -> None:
        """A sequence's tokens were fed."""
        sequence, decoding = work.sequence, work.sequence.is_decoding
        self.stats.prompt_tokens += 0 if decoding else work.count
        is_replaying = len(sequence.work) > 1
        sequence.advance(work.count)
        is_choice = sequence.is_branch and not sequence.generated and not sequence.pending
        if is_choice or (is_replaying and len(sequence.work) == 1):
            self.scheduler.room.mark(sequence)
        if not decoding:
            self.scheduler.keep(sequence)
            self.late.append((sequence.id, Progress(sequence.total_work, sequence.done_work)))

    # -- failures ------------------------------------------------------------------------------------------

    def fail(self, sequence: Sequence, error: PaceError) -> tuple[str, Event]:
        """End a request with an error; a choice takes its whole request with it."""
        return self.recovery.fail(sequence, error)

    def _stuck(self) -> list[tuple[str, Event]]:
        """Nothing runs and something waits: what waits first can never be admitted."""
        if self.scheduler.running or not self.scheduler.waiting:
            return []
        first = self.scheduler.waiting[0]
        return [self.fail(first, RequestError("this request does not fit in KV memory", param="messages"))]

    def _refused(self) -> list[tuple[str, Event]]:
        refused = [*self.mover.openings.refused, *self.scheduler.refused]
        self.mover.openings.refused, self.scheduler.refused = [], []
        return [self.fail(sequence, error) for sequence, error in refused if sequence.id in self.live]

    def forget_progress(self, tenant: str, session: Key | None = None) -> None:
        """Drop the prefill progress that was kept of a session's requests, or of all of a tenant's."""
        if session is not None:
            self.scheduler.progress.forget_session(session, made=True)
        else:
            self.scheduler.progress.forget_tenant(tenant)

    def copy_kv(self, source: int, target: int, length: int) -> None:
        """Copy ``length`` tokens of KV from the start of a block to another, now."""
        self.runner.copy([Copy(source * BLOCK, target * BLOCK, length)])


def run_until_idle(engine: Engine, on_event: Callable[[str, Event], None] | None = None) -> dict[str, list[Event]]:
    """Step until nothing is left to do; every request's events, in order. For tests and tools."""
    events: dict[str, list[Event]] = {}
    while engine.has_work or engine.worker.num_open:
        for request_id, event in engine.step():
            events.setdefault(request_id, []).append(event)
            if on_event is not None:
                on_event(request_id, event)
    return events
