"""From logits to a request's answer: its next token, its text, its choices, its end."""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pacellm.engine.request_state import Live
from pacellm.engine.sequence import Sequence
from pacellm.engine.stats import bank_reads, expert_activity
from pacellm.errors import EngineError, PaceError, RequestError, SessionConflict, SessionDeleted, reason
from pacellm.memory.state import COUNTERS
from pacellm.run.ahead import Chosen
from pacellm.run.runner import Output
from pacellm.run.sampler import choose, logprob, sample, score, shape, uniform
from pacellm.sessions.history import ending_of
from pacellm.sessions.session import Session
from pacellm.types import (
    BankReads,
    ChoiceEnded,
    Delta,
    Event,
    Finished,
    FinishReason,
    PromptScores,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from pacellm.engine.engine import Engine

logger = logging.getLogger("pacellm.engine")


class Answers:
    """What an engine makes of a forward pass.

    Args:
        engine: whose requests these are.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def choose(self, output: Output) -> Chosen:
        """The next token of every sampled row, without waiting for the device."""
        rows = output.logits[: len(output.sampled)]
        shaped, points, failed = rows, [], {}
        for row, sequence in enumerate(output.sampled):
            params, count = sequence.request.sampling, output.num_generated(sequence)
            points.append(uniform(sequence.seed, count))
            if sequence.num_branches or count >= sequence.max_tokens:
                continue  # it gets no token of its own here
            try:
                allowed = sequence.allowed(rows.shape[1])
                if allowed is not None or params.shapes_logits:
                    shaped = rows.clone() if shaped is rows else shaped
                    shaped[row] = shape(rows[row], params, sequence.prompt, sequence.generated, allowed)
            except Exception as error:
                failed[sequence.id] = error
        if not output.sampled:
            return Chosen([], rows.new_empty(0, dtype=torch.int64), {})
        tokens = choose(shaped, [sequence.request.sampling for sequence in output.sampled], points)
        return Chosen(output.sampled, torch.where(rows.isfinite().all(-1), tokens, -1), failed)

    def scores(self, output: Output) -> tuple[list[tuple[str, Event]], dict[str, PaceError]]:
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

    def sample(self, sequence: Sequence, logits: Tensor, chosen: Chosen) -> list[tuple[str, Event]]:
        """Give the sequence the token that was chosen for it; a failure here fails this request alone."""
        live = self._engine.live[sequence.id]
        if sequence.num_branches:
            return self._branch(live, logits, chosen)
        if len(sequence.generated) >= sequence.max_tokens:  # only with max_tokens 0: a warm-up
            return [(live.name, event) for event in self._finish(live, FinishReason.LENGTH)]
        try:
            events = self._accept(live, *self._token(sequence, logits, chosen))
        except RequestError as error:
            return [self._engine.fail(sequence, error)]
        except Exception as error:
            logger.exception("request %s failed while sampling", sequence.id)
            return [self._engine.fail(sequence, EngineError(f"sampling failed: {reason(error)}"))]
        name = live.name
        return [
            (name, dataclasses.replace(event, index=live.index) if isinstance(event, Delta) else event)
            for event in events
        ]

    def _token(self, sequence: Sequence, logits: Tensor, chosen: Chosen) -> tuple[int, TokenLogprob | None]:
        params = sequence.request.sampling
        if not chosen.has(sequence):  # a choice that shares its prompt's row
            allowed = sequence.allowed(len(logits))
            return sample(logits, params, sequence.prompt, sequence.generated, sequence.seed, allowed)
        token = chosen.token(sequence)
        return token, logprob(logits, token, params.logprobs) if params.logprobs is not None else None

    def _branch(self, live: Live, logits: Tensor, chosen: Chosen) -> list[tuple[str, Event]]:
        """The prompt of a request with several choices is in place: each goes on from a copy of it."""
        going = [live]
        for choice in live.choices[1:]:
            self._engine.live[choice.sequence.id] = choice
            if self._engine.scheduler.branch(live.sequence, choice.sequence):
                going.append(choice)
        live.sequence.num_branches = 0
        events: list[tuple[str, Event]] = []
        for choice in going:
            if choice.sequence.id in self._engine.live:
                events += self.sample(choice.sequence, logits, chosen)
        return events

    def _accept(self, live: Live, token: int, logprob: TokenLogprob | None) -> list[Event]:
        sequence, params = live.sequence, live.sequence.request.sampling
        sequence.append(token)
        self._engine.stats.generation_tokens += 1
        logprobs = () if logprob is None else (logprob,)
        ends = not params.ignore_eos and token in self._engine.model.eos_token_ids
        if ends or token in params.stop_token_ids:
            sequence.stop_reason = None if ends else token
            text = live.text.finish() if live.text is not None else ""
            return [Delta(text, (token,), logprobs, is_last=True), *self._finish(live, FinishReason.STOP)]
        text = live.text.push(token) if live.text is not None else ""
        stop = live.text.stopped_by if live.text is not None else None
        is_full = len(sequence.generated) >= sequence.max_tokens
        if stop is None and not sequence.is_complete and not is_full:
            return [Delta(text, (token,), logprobs)]
        sequence.stop_reason = stop
        if live.text is not None:
            text += live.text.finish()
        end = FinishReason.LENGTH if stop is None and not sequence.is_complete else FinishReason.STOP
        return [Delta(text, (token,), logprobs, is_last=True), *self._finish(live, end)]

    def _finish(self, live: Live, reason: FinishReason) -> list[Event]:
        """The request is complete: commit and say so, or first have the session directory take note."""
        sequence = live.sequence
        sequence.finish_reason = reason
        sequence.ending = ending_of(sequence, live.text, self._engine.model.eos_token_ids)
        live.last = self._finished(sequence, reason, bank_reads(self._engine.pool, sequence, self._engine.stats))
        activity = expert_activity(self._engine.pool, sequence, self._engine.stats)
        if sequence.request.experts:
            live.last = dataclasses.replace(live.last, experts=activity)
        if live.index or live.choices:
            return self._end_choice(live, reason)
        return self._complete(live)

    def _end_choice(self, live: Live, reason: FinishReason) -> list[Event]:
        """One of several choices is complete; with the last of them the request is."""
        ended: list[Event] = [ChoiceEnded(live.index, reason, live.sequence.stop_reason)]
        first = self._engine.live[live.name]
        if live is first:
            self._engine.scheduler.hold(live.sequence)
        else:
            del self._engine.live[live.sequence.id]
            self._engine.scheduler.finish(live.sequence)
        if any(choice.last is None for choice in first.choices) or first.last is None:
            return ended
        tokens = sum(len(choice.sequence.generated) for choice in first.choices)
        usage = dataclasses.replace(first.last.usage, completion_tokens=tokens)
        first.last = dataclasses.replace(first.last, usage=usage)
        return [*ended, *self._complete(first)]

    def _complete(self, live: Live) -> list[Event]:
        sequence = live.sequence
        session = sequence.session
        files = self._engine.mover.files
        if session is not None and sequence.request.commit and files is not None:
            if not live.choices:
                self._engine.scheduler.hold(sequence)
            live.is_recorded = True
            pool = self._engine.pool
            files.record(sequence, session, pool, lambda done: self._recorded(live, done))
            return []
        return [self._end(live)]

    def _recorded(self, live: Live, done: Future[None]) -> None:
        """The session directory has taken note of a commit, or refused it."""
        if live.sequence.id not in self._engine.live:
            return
        try:
            self._after_record(live, done)
        except Exception as error:
            self._engine.faults.note("commit", error)
            failed = EngineError(f"the request could not be committed: {reason(error)}")
            self._engine.late.append(self._engine.fail(live.sequence, failed))

    def _after_record(self, live: Live, done: Future[None]) -> None:
        sequence = live.sequence
        session, error = sequence.session, done.exception()
        if error is None and session is not None and not session.deleted:
            event: Event = self._end(live)
            assert self._engine.mover.files is not None
            self._engine.mover.files.recorded(session)
            self._engine.late.append((sequence.id, event))
            return
        if error is None:
            error = SessionDeleted("the session was deleted while this request worked on it")
        elif not isinstance(error, PaceError):
            error = EngineError(f"the session could not be written: {reason(error)}")
        if isinstance(error, SessionConflict) and session is not None:
            self._engine.sessions.remove(session)  # memory is behind; the next request reads what the owner has written
        self._engine.late.append(self._engine.fail(sequence, error))

    def _end(self, live: Live) -> Finished:
        """Commit, and the last event."""
        sequence, last = live.sequence, live.last
        assert last is not None
        session = sequence.session
        if session is not None and last.bank is not None and sequence.request.commit:
            self._note_banks(session, sequence)
        self._engine.scheduler.finish(sequence)
        del self._engine.live[sequence.id]
        self._engine.stats.finished[last.reason.value] += 1
        self._engine.stats.modes[last.pa] += 1
        self._engine.stats.cached_tokens += sequence.cached
        self._engine.stats.count_dropped(sequence)
        return dataclasses.replace(last, session=sequence.session_status)

    def _note_banks(self, session: Session, sequence: Sequence) -> None:
        if self._engine.pool is not None and sequence.row is not None:
            filled = self._engine.pool.filled(sequence.row)
            session.banks = {
                layer: {**dict(zip(COUNTERS, counters, strict=True)), "filled": filled[layer]}
                for layer, counters in self._engine.pool.counters(sequence.row).items()
            }

    def _finished(self, sequence: Sequence, reason: FinishReason, reads: BankReads | None) -> Finished:
        now, admitted = time.monotonic(), sequence.admitted_at or 0.0
        first = sequence.first_token_at or now
        return Finished(
            reason=reason,
            usage=Usage(len(sequence.prompt), sequence.cached, len(sequence.generated), sequence.replayed),
            session=sequence.session_status,
            pa=sequence.turn.pa,
            bank=reads,
            queue_seconds=admitted - sequence.request.arrival,
            prefill_seconds=first - admitted,
            decode_seconds=now - first,
            stop_reason=sequence.stop_reason,
            note=sequence.note,
            kinship=sequence.kinship,
        )
