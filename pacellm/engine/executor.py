"""Runs steps, and where nothing else is to be done the next one before the last one's tokens are read."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from pacellm.engine.recovery import Recovery
from pacellm.engine.scheduler import Scheduler
from pacellm.engine.stats import EngineStats
from pacellm.engine.step import Step
from pacellm.errors import reason
from pacellm.run.ahead import Chosen, Flight, step_after
from pacellm.run.runner import Runner, StepFailed
from pacellm.sessions.operation_queue import OperationQueue

logger = logging.getLogger("pacellm.engine")


class Executor:
    """Launches steps on the device.

    Args:
        runner: the forward pass.
        scheduler, operations: whether something else waits. The former's pace learns what steps take.
        recovery: pays for steps that fail.
        stats: where steps ahead are counted.
        may_run_ahead: steps may be launched before the tokens of the last one are known.
        eos: the model's end tokens.

    Attributes:
        ahead: the next step, where it was launched before its tokens were known.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        operations: OperationQueue,
        recovery: Recovery,
        stats: EngineStats,
        *,
        may_run_ahead: bool,
        eos: Collection[int],
    ) -> None:
        self._runner, self._scheduler, self._operations = runner, scheduler, operations
        self._recovery, self._stats, self._may_run_ahead, self._eos = recovery, stats, may_run_ahead, eos
        self.ahead: Flight | None = None
        self._broken: Step | None = None  # a step ahead that failed
        self._ended = 0.0  # when the last step had

    @property
    def step_ahead(self) -> Step | None:
        """The step that runs already."""
        return None if self.ahead is None else self.ahead.step

    def run(self, step: Step | None) -> Flight | None:
        """The forward pass of a step, if there is one, and the tokens it gives; None where it failed, which one request
        pays for."""
        flight, self.ahead, self._broken = self.ahead, None, None
        if flight is None and step is not None:
            flight = self._launch(step)
        if flight is not None:
            self._launch_ahead(flight)
        return flight

    def _launch(self, step: Step) -> Flight | None:
        prompts = [(work.place, work.count) for work in step.work if not work.sequence.is_decoding]
        started = time.monotonic()
        try:
            output = self._runner.run(step)
            return Flight(step, output, Chosen.of(output), started, prompts)
        except StepFailed as error:
            self._recovery.step_failed(step, error)
        except Exception as error:
            failed = StepFailed(f"{type(error).__name__}: {reason(error)}", None)
            failed.__cause__ = error
            self._recovery.step_failed(step, failed)
        return None

    def _launch_ahead(self, flight: Flight) -> None:
        """Launch the next step before this one's tokens are read, where nothing else is to be done."""
        if not self._may_run_ahead or self._runner.decoder is None:
            return
        if self._scheduler.waiting or self._operations.is_waiting:
            return
        step = step_after(flight.step, len(self._scheduler.running), self._eos)
        if step is None:
            return
        started = time.monotonic()
        try:
            output = self._runner.run_ahead(step, flight.chosen.tokens)
        except StepFailed as error:
            logger.warning("a step ahead failed: %s", error, exc_info=error.__cause__)
            self._broken = step
            return
        if output is not None:
            self.ahead = Flight(step, output, Chosen.of(output), started)
            self._stats.steps_ahead += 1

    def landed(self, flight: Flight) -> None:
        """A step was committed: learn what it took; those of a failed step ahead start again."""
        if self._broken is not None:
            self._recovery.start_again(self._broken)
        # a device has done its work when tokens were sampled, not when the forward pass returned
        ended, begun = time.monotonic(), max(flight.started, self._ended)
        num_decodes = len(flight.step.work) - len(flight.prompts)
        self._scheduler.pace.observe(num_decodes, flight.prompts, ended - begun)
        self._ended = ended

    def forget_ahead(self) -> None:
        """What was launched is not committed."""
        self.ahead = None
