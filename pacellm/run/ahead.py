"""Tokens on their way from the device, and decode steps that are started before they are there.

While a GPU decodes, the host would have to read a step's tokens before it can say what the next one is fed. Instead the
next step is launched on tokens that are still on the device, and the host reads them meanwhile. A token that ends its
answer is told by the device itself: its row then writes neither KV nor banks, and what it gives is dropped. So a step
ahead is only possible where nothing else depends on the tokens, and nothing else wants to run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Step, Work
from pacellm.run import graphs
from pacellm.run.runner import Output
from pacellm.run.sampler import NOT_FINITE


class Chosen:
    """A step's tokens; a GPU is not waited for until they are asked for.

    Args:
        sequences: S that get one; with choices to come, it and they draw their own from its row.
        tokens: [S] int64, -1 where the logits were not finite.
        failed: what went wrong for some of them.
    """

    def __init__(self, sequences: list[Sequence], tokens: Tensor, failed: dict[str, Exception]) -> None:
        self.tokens, self._failed = tokens, failed
        self._places = {one.id: place for place, one in enumerate(sequences) if not one.num_branches}
        self._known: list[int] | None = None
        self._host, self._arrived = tokens, None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def has(self, sequence: Sequence) -> bool:
        """It is one of those that get a token."""
        return sequence.id in self._places

    def token(self, sequence: Sequence) -> int:
        """Its token.

        Raises:
            ValueError: logits that are not finite.
            Exception: whatever went wrong before.
        """
        if sequence.id in self._failed:
            raise self._failed[sequence.id]
        if self._known is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._known = self._host.tolist()
        token = self._known[self._places[sequence.id]]
        if token < 0:
            raise ValueError(NOT_FINITE)
        return token


@dataclass(frozen=True)
class Flight:
    """A step that was launched: its work, what comes of it, and when that was."""

    step: Step
    output: Output
    chosen: Chosen
    started: float


def step_after(step: Step, num_running: int, eos: Collection[int]) -> Step | None:
    """The decode step after ``step``, whose tokens are not known yet; None where it depends on them.

    Args:
        step: launched, not committed.
        num_running: all sequences that run now.
        eos: the model's end tokens.
    """
    are_all = len(step.work) == num_running and all(work.sequence.is_running for work in step.work)
    if not are_all or not graphs.fits(step):
        return None
    work = []
    for before in step.work:
        sequence = before.sequence
        params, position = sequence.request.sampling, sequence.position + 1
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else eos))
        if (
            len(sequence.generated) + 1 >= sequence.max_tokens
            or position >= sequence.table.capacity
            or len(ends) > graphs.ENDS
            or sequence.request.constraint is not None
            or params.shapes_logits
            or params.logprobs is not None
            or params.stop
        ):
            return None
        work.append(Work(sequence, 1, ends))
    return Step(work)
