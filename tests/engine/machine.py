"""A scheduler on a machine that is only arithmetic: what steps cost is known, and the clock is a number."""

import heapq
import itertools
import random
import threading
from array import array
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from pacellm.config import EngineConfig
from pacellm.engine.factory import new_scheduling, new_sessions
from pacellm.engine.sequence import Sequence
from pacellm.errors import PaceError
from pacellm.kv.blocks import BlockAllocator
from pacellm.sessions.worker import Worker
from pacellm.types import FinishReason, GenerationRequest, SamplingParams

NO_MODEL = SimpleNamespace(bytes_per_token=1, ranks=None, device=SimpleNamespace(type="cpu"))
DECODE, TOKEN, DEPTH = 0.016, 2e-4, 2e-8  # seconds of a step, of a prompt token, and more for each token before it


def true_cost(position, count):
    """Seconds of ``count`` prompt tokens from ``position`` on."""
    return count * (TOKEN + DEPTH * (position + count / 2))


@dataclass
class Asked:
    """A request that comes at a moment: prompt and answer in tokens, seconds until its deadline."""

    at: float
    prompt: int
    answer: int
    timeout: float | None = None
    priority: int = 0


@dataclass
class Outcome:
    """What became of it: ``ended`` with ``error`` or, where that is None, with an answer."""

    asked: Asked
    ended: float
    error: PaceError | str | None = None

    @property
    def is_good(self):
        """Answered in time."""
        return self.error is None


class Machine:
    """Runs requests on a scheduler; a device that takes DECODE for a step with decoding streams, and ``true_cost``."""

    def __init__(self, max_num_seqs=16, blocks=8192, **config):
        settings = EngineConfig(pa=False, max_num_seqs=max_num_seqs, **config).resolve(
            context_length=2**19, num_layers=1, bytes_per_token=1, available_memory=2**30
        )
        allocator, worker = BlockAllocator(blocks), Worker(pytest.fail, threading.Condition())
        sessions = new_sessions(settings, allocator, None, [], worker, NO_MODEL, None)
        scheduling = new_scheduling(settings, allocator, None, sessions, lambda copies: None, lambda: self.now)
        self.scheduler, self.queues, self.now = scheduling.scheduler, scheduling.queues, 0.0
        self.outcomes, self._asked, self._number = [], {}, itertools.count()

    def run(self, requests):
        """All outcomes, in the order in which they came."""
        coming = sorted(requests, key=lambda one: one.at)
        deadlines = []
        while coming or self._asked:
            if not self._asked and coming[0].at > self.now:
                self.now = coming[0].at
            while coming and coming[0].at <= self.now:
                self._submit(coming.pop(0), deadlines)
            self._step()
            while deadlines and deadlines[0][0] <= self.now:
                _, _, sequence = heapq.heappop(deadlines)
                if sequence.id in self._asked:
                    self._give_up(sequence, "late")
        return self.outcomes

    def _submit(self, asked, deadlines):
        number = next(self._number)
        deadline = None if asked.timeout is None else asked.at + asked.timeout
        request = GenerationRequest(
            str(number), array("i", [number]) * asked.prompt, SamplingParams(max_tokens=asked.answer),
            arrival=asked.at, deadline=deadline, priority=asked.priority,
        )  # fmt: skip
        sequence = Sequence(request, request.prompt, asked.answer, 0)
        try:
            self.scheduler.deadlines.check(sequence)
        except PaceError as error:
            self.outcomes.append(Outcome(asked, self.now, error))
            return
        self._asked[sequence.id] = asked
        self.scheduler.add(sequence)
        if deadline is not None:
            heapq.heappush(deadlines, (deadline, number, sequence))

    def _give_up(self, sequence, error):
        self.scheduler.remove(sequence, keep=True)
        self.outcomes.append(Outcome(self._asked.pop(sequence.id), self.now, error))

    def _step(self):
        step = self.scheduler.schedule()
        refused = self.queues.take_refused()
        for sequence, error in refused:
            self._give_up(sequence, error)
        if step is None:
            assert refused or not self._asked, "nothing can run"
            return
        parts = [(item.position, item.count) for item in step.work if not item.sequence.is_decoding]
        decodes = len(step.work) - len(parts)
        seconds = (DECODE if decodes else 0.0) + sum(true_cost(*part) for part in parts)
        self.now += seconds
        for item in step.work:
            self._advance(item)
        self.scheduler.pace.observe(decodes, parts, seconds)

    def _advance(self, item):
        sequence, decoding = item.sequence, item.sequence.is_decoding
        is_last = sequence.advance(item.count)
        if not decoding:
            self.scheduler.keep(sequence)
        if not is_last:
            return
        sequence.append(0)
        if len(sequence.generated) >= sequence.max_tokens:
            sequence.finish_reason = FinishReason.LENGTH
            self.scheduler.finish(sequence)
            deadline = sequence.request.deadline
            error = "late" if deadline is not None and self.now > deadline else None
            self.outcomes.append(Outcome(self._asked.pop(sequence.id), self.now, error))


def poisson(rate, seconds, make, seed=0):
    """Requests at random moments, ``rate`` a second."""
    rng, at, found = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append(make(at, rng))
    return found
