"""The engine: requests in, events out, one step at a time. Single-threaded; ``thread.py`` gives it a thread.

A step is: schedule, run, commit. Whatever fails inside a step fails one request; the others of the step start
again from their sessions' states, with the same result.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pacellm.config import EngineConfig
from pacellm.engine.kv import BLOCK, BlockAllocator
from pacellm.engine.runner import Output, Runner, StepFailed
from pacellm.engine.sampler import sample, score
from pacellm.engine.scheduler import Scheduler, Step
from pacellm.engine.sequence import Sequence
from pacellm.engine.sessions import SessionStore
from pacellm.engine.stats import EngineStats, bank_reads
from pacellm.engine.text import TextStream
from pacellm.errors import ConfigError, EngineError, PaceError, RequestError
from pacellm.memory.pool import BankPool, bytes_per_row
from pacellm.model.load import LoadedModel
from pacellm.model.patch import patch, unpatch
from pacellm.types import (
    Admitted,
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
_MIN_BLOCKS = 2  # one for the prompt and one to go on


@dataclass
class _Live:
    """A request and its text, while it is in the engine."""

    sequence: Sequence
    text: TextStream | None
    logprobs: list[TokenLogprob] = field(default_factory=list)


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
            log_memory=self.config.session_log_memory,
            fold_after=4 * (self.config.max_model_len or 0),
        )
        self.scheduler = Scheduler(self.config, self.allocator, self.sessions, self.pool)
        self.runner = Runner(model, self.pool, self.num_blocks, self.config.bank)
        self.stats = EngineStats()
        self._live: dict[str, _Live] = {}

    def _new_pool(self) -> BankPool:
        shapes = patch(self.model.module, self.config.pa_layers or ())
        each = max(1, bytes_per_row(self.config.bank, shapes, self.model.dtype))
        session_rows = min(_MAX_SESSION_ROWS, max(1, (self.config.session_memory or 0) // 8 // each))
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
        """A request is queued or running."""
        return bool(self._live)

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
        if request.sampling.prompt_logprobs is not None and request.session is not None:
            raise RequestError("log-probabilities of a prompt are not available in a session", param="echo")
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
        text = None
        if self.tokenizer is not None:
            skip = request.sampling.skip_special_tokens
            text = TextStream(self.tokenizer, request.sampling.stop, skip_special=skip)
        self._live[sequence.id] = _Live(sequence, text)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> bool:
        """Take a request out wherever it is; False where it has already ended. Its session stays as it was."""
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        self.stats.aborted += 1
        self.scheduler.remove(live.sequence)
        return True

    # -- the step ------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[str, Event]]:
        """Schedule, run, commit. Returns what happened, by request id; nothing where nothing could run."""
        step = self.scheduler.schedule()
        events = self._admissions()
        if step is None:
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
        events = self._scores(output)
        logits, rows = output.logits, {sequence.id: row for row, sequence in enumerate(output.sampled)}
        self.stats.steps += 1
        for work in step.work:
            sequence = work.sequence
            decoding = sequence.is_decoding
            self.stats.prompt_tokens += 0 if decoding else work.count
            sequence.advance(work.count)
            if not decoding:
                events.append((sequence.id, Progress(sequence.total_work, sequence.done_work)))
            if sequence.id in rows:
                events += self._sample(sequence, logits[rows[sequence.id]])
        if self.config.check_integrity:
            self.check_integrity()
        return events

    def _scores(self, output: Output) -> list[tuple[str, Event]]:
        """Log-probabilities of prompt tokens, for the requests that want them."""
        events: list[tuple[str, Event]] = []
        row = len(output.sampled)
        for sequence, count in output.scored:
            top = sequence.request.sampling.prompt_logprobs or 0
            tokens = sequence.prompt[sequence.num_scored + 1 : sequence.num_scored + 1 + count]
            scores = score(output.logits[row : row + count], tokens, top)
            sequence.num_scored += count
            row += count
            events.append((sequence.id, PromptScores(scores)))
        return events

    def _sample(self, sequence: Sequence, logits: Tensor) -> list[tuple[str, Event]]:
        """Choose the sequence's next token; a failure here fails this request alone."""
        live = self._live[sequence.id]
        if len(sequence.generated) >= sequence.max_tokens:  # only with max_tokens 0: a warm-up
            return [(sequence.id, self._finish(live, FinishReason.LENGTH))]
        try:
            params = sequence.request.sampling
            token, logprob = sample(logits, params, sequence.prompt, sequence.generated, sequence.seed)
            return [(sequence.id, event) for event in self._accept(live, token, logprob)]
        except Exception as error:
            logger.exception("request %s failed while sampling", sequence.id)
            return [self._fail(sequence, EngineError(f"sampling failed: {error}"))]

    def _accept(self, live: _Live, token: int, logprob: TokenLogprob | None) -> list[Event]:
        sequence, params = live.sequence, live.sequence.request.sampling
        sequence.append(token)
        self.stats.generation_tokens += 1
        logprobs = () if logprob is None else (logprob,)
        ends = not params.ignore_eos and token in self.model.eos_token_ids
        if ends or token in params.stop_token_ids:
            sequence.stop_reason = None if ends else token
            return [*self._last_text(live, (token,), logprobs), self._finish(live, FinishReason.STOP)]
        text = live.text.push(token) if live.text is not None else ""
        events: list[Event] = [Delta(text, (token,), logprobs)]
        if live.text is not None and live.text.stopped_by is not None:
            sequence.stop_reason = live.text.stopped_by
            return [*events, self._finish(live, FinishReason.STOP)]
        if len(sequence.generated) >= sequence.max_tokens:
            return [*events, *self._last_text(live, (), ()), self._finish(live, FinishReason.LENGTH)]
        return events

    def _last_text(self, live: _Live, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> list[Event]:
        text = live.text.finish() if live.text is not None else ""
        return [Delta(text, tokens, logprobs)] if text or tokens else []

    def _finish(self, live: _Live, reason: FinishReason) -> Finished:
        sequence = live.sequence
        sequence.finish_reason = reason
        reads = bank_reads(self.pool, sequence, self.stats)
        self.scheduler.finish(sequence)
        del self._live[sequence.id]
        now, admitted = time.monotonic(), sequence.admitted_at or 0.0
        first = sequence.first_token_at or now
        self.stats.finished[reason.value] += 1
        self.stats.cached_tokens += sequence.cached
        return Finished(
            reason=reason,
            usage=Usage(len(sequence.prompt), sequence.cached, len(sequence.generated), sequence.replayed),
            session=sequence.session_status,
            bank=reads,
            queue_seconds=admitted - sequence.request.arrival,
            prefill_seconds=first - admitted,
            decode_seconds=now - first,
            stop_reason=sequence.stop_reason,
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
        self.runner.scrub(sequence.table)
        self.scheduler.remove(sequence)
        self._live.pop(sequence.id, None)
        self.stats.failed += 1
        return sequence.id, Failed(error)

    def _stuck(self) -> list[tuple[str, Event]]:
        """Nothing runs and something waits: what waits first can never be admitted."""
        if self.scheduler.running or not self.scheduler.waiting:
            return []
        first = self.scheduler.waiting[0]
        return [self._fail(first, RequestError("this request does not fit in KV memory", param="messages"))]

    def fail_all(self, error: PaceError) -> list[tuple[str, Event]]:
        """End every request with an error."""
        return [self._fail(live.sequence, error) for live in list(self._live.values())]

    def check_integrity(self) -> None:
        """Blocks and rows add up: everything that is held is held by a running request or a session.

        Raises:
            EngineError: something leaked or is held twice.
        """
        held: dict[int, int] = {}
        tables = [sequence.table for sequence in self.scheduler.running] + self.sessions.tables()
        for table in tables:
            for block in table.blocks:
                held[block] = held.get(block, 0) + 1
        wrong = [block for block in range(self.num_blocks) if self.allocator.references(block) != held.get(block, 0)]
        if wrong or self.allocator.num_free != self.num_blocks - len(held):
            raise EngineError(f"KV blocks do not add up: {wrong[:8]}")
        if self.pool is not None:
            rows = [sequence.row for sequence in self.scheduler.running] + self.sessions.rows()
            if len(set(rows)) != len(rows) or self.pool.num_free != self.pool.num_rows - len(rows):
                raise EngineError("bank rows do not add up")


def run_until_idle(engine: Engine, on_event: Callable[[str, Event], None] | None = None) -> dict[str, list[Event]]:
    """Step until nothing is left to do; every request's events, in order. For tests and tools."""
    events: dict[str, list[Event]] = {}
    while engine.has_work:
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
