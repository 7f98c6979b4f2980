"""The engine: requests in, events out, one step at a time. Single-threaded; ``thread.py`` gives it a thread.

A step is: schedule, run, commit. Whatever fails inside a step fails one request; the others of the step start
again from their sessions' states, with the same result.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import os
import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pacellm.config import EngineConfig
from pacellm.engine.kv import BLOCK, BlockAllocator, KVTable
from pacellm.engine.mover import Mover
from pacellm.engine.records import Records
from pacellm.engine.runner import Output, Runner, StepFailed
from pacellm.engine.sampler import sample, score
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.sequence import Sequence
from pacellm.engine.session import Key, Session
from pacellm.engine.session_ops import SessionOps
from pacellm.engine.sessions import SessionStore
from pacellm.engine.snapshot_ops import SnapshotOps
from pacellm.engine.stats import EngineStats, bank_reads
from pacellm.engine.step import Copy, Step
from pacellm.engine.text import TextStream
from pacellm.errors import ConfigError, EngineError, PaceError, RequestError, SessionConflict, SessionDeleted
from pacellm.memory.disk import Disk
from pacellm.memory.pool import BankPool, bytes_per_row
from pacellm.memory.snapshot import fingerprint
from pacellm.memory.state import COUNTERS
from pacellm.memory.tiers import Worker
from pacellm.model.load import LoadedModel
from pacellm.model.patch import patch, unpatch
from pacellm.types import (
    Admitted,
    BankReads,
    ChoiceEnded,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Progress,
    PromptScores,
    TokenLogprob,
    Usage,
)

logger = logging.getLogger("pacellm.engine")
_MAX_SESSION_ROWS = 256
_WAIT = 0.002  # seconds that a step waits for the worker where nothing else can run
_MIN_BLOCKS = 2  # one for the prompt and one to go on


@dataclass
class _Live:
    """A request and its text, while it is in the engine."""

    sequence: Sequence
    text: TextStream | None
    last: Finished | None = None
    index: int = 0
    choices: list[_Live] = field(default_factory=list)  # all of its request, by index, where there are several
    is_recorded: bool = False  # its commit is on its way to disk and can no longer be taken back


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
        unpatch(model.module)
        self.model, self.tokenizer = model, tokenizer
        self.config = (config or EngineConfig()).resolve(
            context_length=model.context_length,
            num_layers=model.num_layers,
            bytes_per_token=model.bytes_per_token,
            available_memory=_available_memory(model.device),
        )
        self.block_bytes = BLOCK * model.bytes_per_token
        self.num_blocks = (self.config.kv_cache_memory or 0) // self.block_bytes
        if self.num_blocks < _MIN_BLOCKS:
            raise ConfigError(
                f"kv_cache_memory of {self.config.kv_cache_memory:,} bytes holds no request; this model needs at least "
                f"{_MIN_BLOCKS * self.block_bytes:,}",
                param="kv_cache_memory",
            )
        # a context that KV memory cannot hold would fail in the middle of an answer
        context = min(self.config.max_model_len or 0, self.num_blocks * BLOCK)
        self.config = dataclasses.replace(self.config, max_model_len=context)
        self.allocator = BlockAllocator(self.num_blocks)
        self.pool = self._new_pool() if self.config.pa else None
        self.sessions = SessionStore(
            self.allocator,
            self.pool,
            block_bytes=self.block_bytes,
            memory=self.config.session_memory or 0,
            max_rows=self.pool.num_rows - self.config.max_num_seqs if self.pool is not None else 0,
            ttl=self.config.session_ttl,
            log_memory=self.config.session_log_memory,
            fold_after=4 * (self.config.max_model_len or 0),
        )
        self.scheduler = Scheduler(self.config, self.allocator, self.sessions, self.pool)
        self.runner = Runner(model, self.pool, self.num_blocks, self.config.bank)
        self.scheduler.room.copy_now = self.runner.copy
        self.stats = EngineStats()
        self.worker = Worker()
        self._records: Records | None = None
        disk = self._open_disk() if self.config.session_dir is not None else None
        self.mover = self.scheduler.mover = Mover(
            self.sessions,
            self.allocator,
            self.pool,
            self.runner.slabs,
            self.worker,
            host_memory=self._host_memory(),
            disk=disk,
            records=self.records if disk is not None else None,
            bytes_per_token=model.bytes_per_token,
        )
        if disk is not None:
            for owner in sorted(disk.owners(), key=lambda owner: owner.changed):
                self.sessions.add(self.mover.openings.from_owner(owner))
        self.ops = SessionOps(self)
        self.snapshots = SnapshotOps(self, self.ops)
        self._live: dict[str, _Live] = {}
        self._events: list[tuple[str, Event]] = []  # of this step, from what the worker and operations brought

    @property
    def records(self) -> Records:
        """How sessions of this model and config are written; the weights are hashed when first asked."""
        if self._records is None:
            self._records = Records(
                self._fingerprint(),
                vocab_size=self.model.vocab_size,
                slabs=self.runner.slabs,
                like=self.pool.banks(0) if self.pool is not None else {},
                max_tokens=self.config.max_model_len or 0,
            )
        return self._records

    def _fingerprint(self) -> str:
        tokenizer = self.tokenizer.to_str() if self.tokenizer is not None else ""
        facts = {
            "pa": dataclasses.asdict(self.config.bank) if self.config.pa else None,
            "pa_layers": self.config.pa_layers if self.config.pa else None,
            "layout": None,
            "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
            "kv_shapes": self.model.kv_shapes,
            "dtype": str(self.model.dtype),
        }
        weights = ((name.replace(".mlp.original.", ".mlp."), w) for name, w in self.model.module.named_parameters())
        return fingerprint(weights, facts)

    def _open_disk(self) -> Disk:
        return Disk(self.config.session_dir or "", sync=self.config.session_sync)

    def _host_memory(self) -> int:
        if self.config.session_host_memory is not None:
            return self.config.session_host_memory
        return 0 if self.model.device.type == "cpu" else self.config.session_memory or 0

    def close(self) -> None:
        """Write every session out and let the session directory go; the engine runs nothing more."""
        self.mover.save_all()
        self.worker.close()
        if self.mover.disk is not None:
            self.mover.disk.close()

    def _new_pool(self) -> BankPool:
        shapes = patch(self.model.module, self.config.pa_layers or ())
        each = max(1, bytes_per_row(self.config.bank, shapes, self.model.dtype))
        if self.config.pa_memory is None:
            session_rows = min(_MAX_SESSION_ROWS, max(1, (self.config.session_memory or 0) // 8 // each))
        else:
            session_rows = self.config.pa_memory // each - self.config.max_num_seqs
        if session_rows < 1:
            raise ConfigError(
                f"pa_memory of {self.config.pa_memory:,} bytes holds no session beside {self.config.max_num_seqs} "
                f"running requests (max_num_seqs); {each:,} bytes each, so at least "
                f"{each * (self.config.max_num_seqs + 1):,}",
                param="pa_memory",
            )
        return BankPool(
            self.config.bank,
            shapes,
            num_rows=self.config.max_num_seqs + session_rows,
            num_stages=self.config.max_num_seqs,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    # -- requests ------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A request is queued or running, or a session operation waits."""
        return bool(self._live) or self.ops.is_waiting

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

    def check(self, request: GenerationRequest) -> None:
        """Refuse what can never run; touches nothing, so any thread may call it.

        Raises:
            RequestError: names the field.
        """
        self.scheduler.check(len(request.prompt), request.sampling.max_tokens)
        if not 1 <= request.n <= self.config.max_num_seqs:
            raise RequestError(f"n must be 1 to {self.config.max_num_seqs} here, not {request.n}", param="n")
        if request.sampling.prompt_logprobs is not None and request.session is not None:
            raise RequestError("log-probabilities of a prompt are not available in a session", param="echo")
        if request.constraint is not None and request.sampling.ignore_eos:
            raise RequestError("ignore_eos contradicts a constrained answer", param="ignore_eos", code="invalid_value")
        vocabulary = self.model.vocab_size
        for token, _ in request.sampling.logit_bias:
            if token >= vocabulary:
                raise RequestError(
                    f"logit_bias names token {token}; the vocabulary has {vocabulary} tokens", param="logit_bias"
                )
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            raise RequestError(f"the prompt has a token outside the vocabulary of {vocabulary}", param="messages")

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never run, or its id is in use.
        """
        self.check(request)
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        room = (self.config.max_model_len or 0) - len(request.prompt)
        asked, seed = request.sampling.max_tokens, request.sampling.seed
        sequence = Sequence(
            request=request,
            prompt=array("i", request.prompt),
            max_tokens=room if asked is None else asked,
            seed=int.from_bytes(os.urandom(8), "little") if seed is None else seed,
        )
        live = self._live[sequence.id] = _Live(sequence, self._new_text(request))
        self.scheduler.add(sequence)
        if request.n > 1:
            live.choices = [live, *(self._choice(live, index) for index in range(1, request.n))]
            sequence.num_branches = request.n - 1

    def _new_text(self, request: GenerationRequest) -> TextStream | None:
        if self.tokenizer is None:
            return None
        return TextStream(self.tokenizer, request.sampling.stop, skip_special=request.sampling.skip_special_tokens)

    def _choice(self, first: _Live, index: int) -> _Live:
        """A further choice, with a seed of its own that follows from the request's."""
        request = first.sequence.request
        sequence = Sequence(
            request=dataclasses.replace(request, request_id=f"{request.request_id}#{index}", commit=False, n=1),
            prompt=first.sequence.prompt,
            max_tokens=first.sequence.max_tokens,
            seed=(first.sequence.seed + index) % 2**63,
            is_branch=True,
        )
        return _Live(sequence, self._new_text(request), index=index)

    def abort(self, request_id: str) -> bool:
        """Take a request out wherever it is; False where it has already ended. Its session stays as it was."""
        live = self._live.get(request_id)
        if live is None or live.is_recorded:
            return False
        if live.index:
            return False  # a choice is no request
        self.stats.aborted += 1
        self._take_out(live, keep=True)
        return True

    def _take_out(self, live: _Live, *, keep: bool = False) -> None:
        """Remove a request with all its choices."""
        for choice in [*live.choices[1:], live]:
            self._live.pop(choice.sequence.id, None)
            self.scheduler.remove(choice.sequence, keep=keep)

    # -- the step ------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[str, Event]]:
        """Schedule, run, commit. Returns what happened, by request id; nothing where nothing could run."""
        self.worker.poll()
        for session in self.sessions.expired():
            self.ops.expire(session)
        self.ops.run()
        step = self.scheduler.schedule()
        events, self._events = self._events + self._refused() + self._admissions(), []
        if step is None:
            if self.worker.num_open:
                self.worker.wait(_WAIT)
                return events
            return events + self._stuck()
        try:
            output = self.runner.run(step)
        except StepFailed as error:
            return events + self._recover(step, error)
        return events + self._commit(step, output)

    def _admissions(self) -> list[tuple[str, Event]]:
        admitted, self.scheduler.admitted = self.scheduler.admitted, []
        return [(sequence.id, Admitted(sequence.session_status, sequence.cached)) for sequence in admitted]

    def _commit(self, step: Step, output: Output) -> list[tuple[str, Event]]:
        events, failed = self._scores(output)
        logits, rows = output.logits, {sequence.id: row for row, sequence in enumerate(output.sampled)}
        self.stats.steps += 1
        for work in step.work:
            sequence = work.sequence
            decoding = sequence.is_decoding
            self.stats.prompt_tokens += 0 if decoding else work.count
            sequence.advance(work.count)
            if not decoding:
                self.scheduler.keep(sequence)
            if not decoding:
                events.append((sequence.id, Progress(sequence.total_work, sequence.done_work)))
            is_live = sequence.id in self._live  # a failed choice takes the others along
            if sequence.id in failed and is_live:
                events.append(self._fail(sequence, failed[sequence.id]))
            elif sequence.id in rows and is_live:
                events += self._sample(sequence, logits[rows[sequence.id]])
        if self.config.check_integrity:
            self.check_integrity()
        return events

    def _scores(self, output: Output) -> tuple[list[tuple[str, Event]], dict[str, PaceError]]:
        """Log-probabilities of prompt tokens, for the requests that want them; and where that failed, by request."""
        events: list[tuple[str, Event]] = []
        failed: dict[str, PaceError] = {}
        row = len(output.sampled)
        for sequence, count in output.scored:
            top = sequence.request.sampling.prompt_logprobs or 0
            tokens = sequence.prompt[sequence.num_scored + 1 : sequence.num_scored + 1 + count]
            try:
                events.append((sequence.id, PromptScores(score(output.logits[row : row + count], tokens, top))))
            except ValueError as error:
                failed[sequence.id] = EngineError(f"scoring the prompt failed: {error}")
            sequence.num_scored += count
            row += count
        return events, failed

    def _sample(self, sequence: Sequence, logits: Tensor) -> list[tuple[str, Event]]:
        """Choose the sequence's next token; a failure here fails this request alone."""
        live = self._live[sequence.id]
        if sequence.num_branches:
            return self._branch(live, logits)
        if len(sequence.generated) >= sequence.max_tokens:  # only with max_tokens 0: a warm-up
            return [(sequence.id, event) for event in self._finish(live, FinishReason.LENGTH)]
        try:
            params = sequence.request.sampling
            allowed = sequence.allowed(len(logits))
            token, logprob = sample(logits, params, sequence.prompt, sequence.generated, sequence.seed, allowed)
            events = self._accept(live, token, logprob)
        except RequestError as error:
            return [self._fail(sequence, error)]
        except Exception as error:
            logger.exception("request %s failed while sampling", sequence.id)
            return [self._fail(sequence, EngineError(f"sampling failed: {error}"))]
        name = self._name(live)
        return [
            (name, dataclasses.replace(event, index=live.index) if isinstance(event, Delta) else event)
            for event in events
        ]

    def _branch(self, live: _Live, logits: Tensor) -> list[tuple[str, Event]]:
        """The prompt of a request with several choices is in place: each goes on from a copy of it."""
        going = [live]
        for choice in live.choices[1:]:
            self._live[choice.sequence.id] = choice
            if self.scheduler.branch(live.sequence, choice.sequence):
                going.append(choice)
        live.sequence.num_branches = 0
        events: list[tuple[str, Event]] = []
        for choice in going:
            if choice.sequence.id in self._live:
                events += self._sample(choice.sequence, logits)
        return events

    def _name(self, live: _Live) -> str:
        """The id of the request that a choice belongs to."""
        return live.sequence.id.rpartition("#")[0] if live.index else live.sequence.id

    def _accept(self, live: _Live, token: int, logprob: TokenLogprob | None) -> list[Event]:
        sequence, params = live.sequence, live.sequence.request.sampling
        sequence.append(token)
        self.stats.generation_tokens += 1
        logprobs = () if logprob is None else (logprob,)
        ends = not params.ignore_eos and token in self.model.eos_token_ids
        if ends or token in params.stop_token_ids:
            sequence.stop_reason = None if ends else token
            return [*self._last_text(live, (token,), logprobs), *self._finish(live, FinishReason.STOP)]
        text = live.text.push(token) if live.text is not None else ""
        events: list[Event] = [Delta(text, (token,), logprobs)]
        if live.text is not None and live.text.stopped_by is not None:
            sequence.stop_reason = live.text.stopped_by
            return [*events, *self._finish(live, FinishReason.STOP)]
        if sequence.is_complete:
            return [*events, *self._last_text(live, (), ()), *self._finish(live, FinishReason.STOP)]
        if len(sequence.generated) >= sequence.max_tokens:
            return [*events, *self._last_text(live, (), ()), *self._finish(live, FinishReason.LENGTH)]
        return events

    def _last_text(self, live: _Live, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> list[Event]:
        text = live.text.finish() if live.text is not None else ""
        return [Delta(text, tokens, logprobs)] if text or tokens else []

    def _finish(self, live: _Live, reason: FinishReason) -> list[Event]:
        """The request is complete: commit and say so, or first have the session directory take note."""
        sequence = live.sequence
        sequence.finish_reason = reason
        live.last = self._finished(sequence, reason, bank_reads(self.pool, sequence, self.stats))
        if live.index or live.choices:
            return self._end_choice(live, reason)
        return self._complete(live)

    def _end_choice(self, live: _Live, reason: FinishReason) -> list[Event]:
        """One of several choices is complete; with the last of them the request is."""
        ended: list[Event] = [ChoiceEnded(live.index, reason, live.sequence.stop_reason)]
        first = self._live[self._name(live)]
        if live is first:
            self.scheduler.hold(live.sequence)
        else:
            del self._live[live.sequence.id]
            self.scheduler.finish(live.sequence)
        if any(choice.last is None for choice in first.choices) or first.last is None:
            return ended
        tokens = sum(len(choice.sequence.generated) for choice in first.choices)
        usage = dataclasses.replace(first.last.usage, completion_tokens=tokens)
        first.last = dataclasses.replace(first.last, usage=usage)
        return [*ended, *self._complete(first)]

    def _complete(self, live: _Live) -> list[Event]:
        sequence = live.sequence
        session = sequence.session
        if session is not None and sequence.request.commit and self.mover.disk is not None:
            if not live.choices:
                self.scheduler.hold(sequence)
            live.is_recorded = True
            self.mover.record(session, sequence.fed(), sequence.row, lambda done: self._recorded(live, done))
            return []
        return [self._end(live)]

    def _recorded(self, live: _Live, done: Future[None]) -> None:
        """The session directory has taken note of a commit, or refused it."""
        sequence = live.sequence
        if sequence.id not in self._live:
            return
        session, error = sequence.session, done.exception()
        if error is None and session is not None and not session.deleted:
            event: Event = self._end(live)
            self.mover.recorded(session)
            self._events.append((sequence.id, event))
            return
        if error is None:
            error = SessionDeleted("the session was deleted while this request worked on it")
        elif not isinstance(error, PaceError):
            error = EngineError(f"the session could not be written: {error}")
        if isinstance(error, SessionConflict) and session is not None:
            self.sessions.remove(session)  # memory is behind; the next request reads what the owner has written
        self._events.append(self._fail(sequence, error))

    def _end(self, live: _Live) -> Finished:
        """Commit, and the last event."""
        sequence, last = live.sequence, live.last
        assert last is not None
        session = sequence.session
        if session is not None and last.bank is not None and sequence.request.commit:
            self._note_banks(session, sequence)
        self.scheduler.finish(sequence)
        del self._live[sequence.id]
        self.stats.finished[last.reason.value] += 1
        self.stats.cached_tokens += sequence.cached
        return dataclasses.replace(last, session=sequence.session_status)

    def _note_banks(self, session: Session, sequence: Sequence) -> None:
        if self.pool is not None and sequence.row is not None:
            filled = self.pool.filled(sequence.row)
            session.banks = {
                layer: {**dict(zip(COUNTERS, counters, strict=True)), "filled": filled[layer]}
                for layer, counters in self.pool.counters(sequence.row).items()
            }

    def _finished(self, sequence: Sequence, reason: FinishReason, reads: BankReads | None) -> Finished:
        now, admitted = time.monotonic(), sequence.admitted_at or 0.0
        first = sequence.first_token_at or now
        return Finished(
            reason=reason,
            usage=Usage(len(sequence.prompt), sequence.cached, len(sequence.generated), sequence.replayed),
            session=sequence.session_status,
            bank=reads,
            queue_seconds=admitted - sequence.request.arrival,
            prefill_seconds=first - admitted,
            decode_seconds=now - first,
            stop_reason=sequence.stop_reason,
            note=sequence.note,
        )

    # -- failures ------------------------------------------------------------------------------------------

    def _recover(self, step: Step, error: StepFailed) -> list[tuple[str, Event]]:
        """Fail the sequence that the step failed on, or its largest; the others start again."""
        blamed = error.sequence or max(step.work, key=lambda work: work.count).sequence
        logger.error("step failed on request %s: %s", blamed.id, error, exc_info=error.__cause__)
        for work in reversed(step.work):
            if work.sequence is not blamed:
                self.scheduler.preempt(work.sequence)
        failed = self._fail(blamed, EngineError(f"the model failed on this request: {error}"))
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return [failed]

    def _fail(self, sequence: Sequence, error: PaceError) -> tuple[str, Event]:
        """End a request with an error; a choice takes its whole request with it."""
        live = self._live.get(sequence.id)
        name = self._name(live) if live is not None else sequence.id
        first = self._live.get(name)
        if first is not None and first.choices:
            self._scrub(sequence)
            self._take_out(first)
            self.stats.failed += 1
            return name, Failed(error)
        self._scrub(sequence)
        self.scheduler.remove(sequence)
        self._live.pop(sequence.id, None)
        self.stats.failed += 1
        return sequence.id, Failed(error)

    def _scrub(self, sequence: Sequence) -> None:
        self.scheduler.progress.forget_request(sequence.id)
        # blocks that others hold were whole before this request
        owned = [block for block in sequence.table.blocks if self.allocator.references(block) == 1]
        self.runner.scrub(KVTable(owned))

    def _stuck(self) -> list[tuple[str, Event]]:
        """Nothing runs and something waits: what waits first can never be admitted."""
        if self.scheduler.running or not self.scheduler.waiting:
            return []
        first = self.scheduler.waiting[0]
        return [self._fail(first, RequestError("this request does not fit in KV memory", param="messages"))]

    def _refused(self) -> list[tuple[str, Event]]:
        refused, self.mover.openings.refused = self.mover.openings.refused, []
        return [self._fail(sequence, error) for sequence, error in refused if sequence.id in self._live]

    def forget_progress(self, tenant: str, session: Key | None = None) -> None:
        """Drop the prefill progress that was kept of a session's requests, or of all of a tenant's."""
        if session is not None:
            self.scheduler.progress.forget_session(session, made=True)
        else:
            self.scheduler.progress.forget_tenant(tenant)

    def copy_kv(self, source: int, target: int, length: int) -> None:
        """Copy ``length`` tokens of KV from the start of a block to another, now."""
        self.runner.copy([Copy(source * BLOCK, target * BLOCK, length)])

    def end_requests_of(self, key: Key) -> None:
        """The session is being deleted: whatever waits for it or works on it ends with an error."""
        for live in list(self._live.values()):
            if live.sequence.request.session == key and not (live.is_recorded or live.index):
                error = SessionDeleted("the session was deleted while this request was in progress")
                self._events.append(self._fail(live.sequence, error))

    def fail_all(self, error: PaceError) -> list[tuple[str, Event]]:
        """End every request with an error."""
        return [self._fail(live.sequence, error) for live in list(self._live.values()) if not live.index]

    def check_integrity(self) -> None:
        """Blocks and rows add up: everything that is held is held by a running request or a session.

        Raises:
            EngineError: something leaked or is held twice.
        """
        held: dict[int, int] = {}
        working = [*self.scheduler.running, *self.scheduler.finishing]
        tables = [sequence.table for sequence in working] + self.sessions.tables()
        tables += self.scheduler.progress.tables()
        for table in tables:
            for block in table.blocks:
                held[block] = held.get(block, 0) + 1
        wrong = [block for block in range(self.num_blocks) if self.allocator.references(block) != held.get(block, 0)]
        if wrong or self.allocator.num_free != self.num_blocks - len(held):
            raise EngineError(f"KV blocks do not add up: {wrong[:8]}")
        if self.pool is not None:
            rows = [sequence.row for sequence in working] + self.sessions.rows()
            rows += self.scheduler.progress.rows()
            if len(set(rows)) != len(rows) or self.pool.num_free != self.pool.num_rows - len(rows):
                raise EngineError("bank rows do not add up")


def run_until_idle(engine: Engine, on_event: Callable[[str, Event], None] | None = None) -> dict[str, list[Event]]:
    """Step until nothing is left to do; every request's events, in order. For tests and tools."""
    events: dict[str, list[Event]] = {}
    while engine.has_work or engine.worker.num_open:
        for request_id, event in engine.step():
            events.setdefault(request_id, []).append(event)
            if on_event is not None:
                on_event(request_id, event)
    return events


def _available_memory(device: torch.device) -> int:
    """Bytes that may be used: 90 % of what is free on a GPU, half of what is available on a host."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return available * 1024 // 2
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
