"""From logits to a request's answer: its next token, its text, its choices, its end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Collection
from concurrent.futures import Future

from torch import Tensor

from pacellm.engine.admission import Admission
from pacellm.engine.recovery import Recovery
from pacellm.engine.request_state import Outbox, Requests, RequestState
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.sequence import Sequence
from pacellm.engine.stats import EngineStats, bank_reads, expert_activity
from pacellm.errors import EngineError, PaceError, RequestError, SessionConflict, SessionDeleted, reason
from pacellm.faults import Faults
from pacellm.memory.pool import BankPool
from pacellm.memory.state import COUNTERS
from pacellm.run.ahead import Chosen
from pacellm.run.runner import Output
from pacellm.run.sampler import logprob, sample, score
from pacellm.sessions.atomic import Unsettled
from pacellm.sessions.files import SessionFiles
from pacellm.sessions.history import ending_of
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore
from pacellm.types import (
    BankReads,
    ChoiceEnded,
    Delta,
    Event,
    Finished,
    FinishReason,
    MemoryUse,
    PromptScores,
    TokenLogprob,
    Usage,
)

logger = logging.getLogger("pacellm.engine")


class Answers:
    """What an engine makes of a forward pass.

    Args:
        requests: whose answers these are. outbox: what happens to them later than in a step's commit.
        scheduler, admission: their working copies.
        sessions, files: where they are committed; files is None without a session directory.
        pool: of banks; None without PA.
        recovery, faults: for what fails.
        stats: where tokens and ends are counted.
        eos: the model's end tokens.
    """

    def __init__(
        self,
        requests: Requests,
        outbox: Outbox,
        scheduler: Scheduler,
        admission: Admission,
        sessions: SessionStore,
        files: SessionFiles | None,
        pool: BankPool | None,
        recovery: Recovery,
        stats: EngineStats,
        faults: Faults,
        *,
        eos: Collection[int],
    ) -> None:
        self._requests, self._outbox, self._scheduler, self._admission = requests, outbox, scheduler, admission
        self._sessions, self._files, self._pool = sessions, files, pool
        self._recovery, self._stats, self._faults, self._eos = recovery, stats, faults, eos

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
        state = self._requests[sequence.id]
        request_id = state.request_id
        if sequence.num_branches:
            return self._branch(state, logits, chosen)
        if len(sequence.generated) >= sequence.max_tokens:  # only with max_tokens 0: a warm-up
            return [(request_id, event) for event in self._finish(state, FinishReason.LENGTH)]
        try:
            events = self._accept(state, *self._token(sequence, logits, chosen))
        except RequestError as error:
            return [self._recovery.fail(sequence, error)]
        except Exception as error:
            logger.exception("request %s failed while sampling", sequence.id)
            return [self._recovery.fail(sequence, EngineError(f"sampling failed: {reason(error)}"))]
        if state.index:
            events = [dataclasses.replace(one, index=state.index) if isinstance(one, Delta) else one for one in events]
        return [(request_id, event) for event in events]

    def _token(self, sequence: Sequence, logits: Tensor, chosen: Chosen) -> tuple[int, TokenLogprob | None]:
        params = sequence.request.sampling
        if not chosen.has(sequence):  # a choice that shares its prompt's row
            allowed = sequence.allowed(len(logits))
            return sample(logits, params, sequence.prompt, sequence.generated, sequence.seed, allowed)
        token = chosen.token(sequence)
        return token, logprob(logits, token, params.logprobs) if params.logprobs is not None else None

    def _branch(self, state: RequestState, logits: Tensor, chosen: Chosen) -> list[tuple[str, Event]]:
        """The prompt of a request with several choices is in place: each goes on from a copy of it."""
        going = [state]
        for choice in state.choices[1:]:
            self._requests[choice.sequence.id] = choice
            if self._admission.branch(state.sequence, choice.sequence):
                going.append(choice)
        state.sequence.num_branches = 0
        events: list[tuple[str, Event]] = []
        for choice in going:
            if choice.sequence.id in self._requests:
                events += self.sample(choice.sequence, logits, chosen)
        return events

    def _accept(self, state: RequestState, token: int, logprob: TokenLogprob | None) -> list[Event]:
        sequence = state.sequence
        sequence.append(token)
        self._stats.generation_tokens += 1
        logprobs = () if logprob is None else (logprob,)
        if self._is_end(sequence, token):
            text, end = state.rest(), FinishReason.STOP
        else:
            text, why = state.push(token), _reason(state)
            if why is None:
                return [Delta(text, (token,), logprobs)]
            sequence.stop_reason = state.stopped_by
            text, end = text + state.rest(), why
        return [Delta(text, (token,), logprobs, is_last=True), *self._finish(state, end)]

    def _is_end(self, sequence: Sequence, token: int) -> bool:
        """The token ends the answer by itself; a client's own stop token is told."""
        params = sequence.request.sampling
        if not params.ignore_eos and token in self._eos:
            return True
        if token in params.stop_token_ids:
            sequence.stop_reason = token
            return True
        return False

    def _finish(self, state: RequestState, reason: FinishReason) -> list[Event]:
        """The request is complete: commit and say so, or first have the session directory take note."""
        sequence = state.sequence
        sequence.finish_reason = reason
        sequence.ending = ending_of(sequence, state.text, self._eos)
        state.last = self._finished(sequence, reason, bank_reads(self._pool, sequence, self._stats))
        activity = expert_activity(self._pool, sequence, self._stats)
        if sequence.request.experts:
            state.last = dataclasses.replace(state.last, experts=activity)
        if state.index or state.choices:
            return self._end_choice(state, reason)
        return self._complete(state)

    def _end_choice(self, state: RequestState, reason: FinishReason) -> list[Event]:
        """One of several choices is complete; with the last of them the request is."""
        ended: list[Event] = [ChoiceEnded(state.index, reason, state.sequence.stop_reason)]
        first = self._requests[state.request_id]
        if state is first:
            self._scheduler.hold(state.sequence)
        else:
            del self._requests[state.sequence.id]
            self._scheduler.finish(state.sequence)
        if any(choice.last is None for choice in first.choices) or first.last is None:
            return ended
        tokens = sum(len(choice.sequence.generated) for choice in first.choices)
        usage = dataclasses.replace(first.last.usage, completion_tokens=tokens)
        first.last = dataclasses.replace(first.last, usage=usage)
        return [*ended, *self._complete(first)]

    def _complete(self, state: RequestState) -> list[Event]:
        sequence = state.sequence
        session = sequence.session
        if session is not None and sequence.request.commit and self._files is not None:
            if not state.choices:
                self._scheduler.hold(sequence)
            state.is_recorded = True
            self._files.record(sequence, session, self._pool, lambda done: self._recorded(state, done))
            return []
        return [self._end(state)]

    def _recorded(self, state: RequestState, done: Future[None]) -> None:
        """The session directory has taken note of a commit, or refused it."""
        if state.sequence.id not in self._requests:
            return
        try:
            self._after_record(state, done)
        except Exception as error:
            self._faults.note("commit", error)
            failed = EngineError(f"the request could not be committed: {reason(error)}")
            self._outbox.put(self._recovery.fail(state.sequence, failed))

    def _after_record(self, state: RequestState, done: Future[None]) -> None:
        sequence = state.sequence
        session, error = sequence.session, done.exception()
        if error is None and session is not None and not session.deleted:
            event: Event = self._end(state)
            assert self._files is not None
            self._files.recorded(session)
            self._outbox.put((sequence.id, event))
            return
        if session is not None and not session.deleted and isinstance(error, SessionConflict | Unsettled):
            self._sessions.remove(session)  # memory may be behind; the next request reads what the disk has
        if error is None:
            error = SessionDeleted("the session was deleted while this request worked on it")
        elif not isinstance(error, PaceError):
            error = EngineError(f"the session could not be written: {reason(error)}")
        self._outbox.put(self._recovery.fail(sequence, error))

    def _end(self, state: RequestState) -> Finished:
        """Commit, and the last event."""
        sequence, last = state.sequence, state.last
        assert last is not None
        session = sequence.session
        if session is not None and last.bank is not None and sequence.request.commit:
            self._note_banks(session, sequence, last.bank)
        self._scheduler.finish(sequence)
        del self._requests[sequence.id]
        self._stats.finished[last.reason.value] += 1
        self._stats.modes[last.pa] += 1
        self._stats.cached_tokens += sequence.cached
        self._stats.count_dropped(sequence)
        if last.memory is not None and last.memory.called_back:
            self._stats.recalls += 1
            self._stats.recalled_tokens += sum(end - start for start, end in last.memory.called_back)
        return dataclasses.replace(last, session=sequence.session_status)

    def _note_banks(self, session: Session, sequence: Sequence, reads: BankReads) -> None:
        session.note_ranks({layer: found.effective_rank for layer, found in reads.layers.items()})
        if self._pool is not None and sequence.row is not None:
            filled = self._pool.filled(sequence.row)
            session.banks = {
                layer: {**dict(zip(COUNTERS, counters, strict=True)), "filled": filled[layer]}
                for layer, counters in self._pool.counters(sequence.row).items()
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
            memory=_memory_use(sequence),
            trace=None if sequence.trace is None else sequence.trace.told(sequence.generated),
        )


def _memory_use(sequence: Sequence) -> MemoryUse | None:
    budget, recall = sequence.turn.budget, sequence.turn.recall
    if budget is None:
        return None
    called = () if recall is None else tuple((span.start, span.end) for span in recall.spans)
    resident = sequence.table.place(sequence.position)
    return MemoryUse(budget.tokens, resident, called, sequence.passages)


def _reason(state: RequestState) -> FinishReason | None:
    """Why an answer ends with the token that it has just got; None where it goes on."""
    if state.stopped_by is not None or state.sequence.is_complete:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(state.sequence.generated) >= state.sequence.max_tokens else None
