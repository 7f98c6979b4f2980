"""Tokens on their way from the device, and decode steps that are started before they are there.

While a GPU decodes, the host would have to read a step's tokens before it can say what the next one is fed. Instead the
next step is launched on tokens that are still on the device, and the host reads them meanwhile. A token that ends its
answer is told by the device itself: its row then writes neither KV nor banks, and what it gives is dropped. So a step
ahead is only possible where nothing else depends on the tokens, and nothing else wants to run.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Step, Work
from pacellm.run import graphs
from pacellm.run.runner import Output
from pacellm.run.sampler import NOT_FINITE, choose, shape, uniform


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

    @classmethod
    def of(cls, output: Output) -> Chosen:
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
            return cls([], rows.new_empty(0, dtype=torch.int64), {})
        tokens = choose(shaped, [sequence.request.sampling for sequence in output.sampled], points)
        return cls(output.sampled, torch.where(rows.isfinite().all(-1), tokens, -1), failed)

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
    """A step that was launched.

    Attributes:
        step: its work. output, chosen: what comes of it.
        started: when it was launched, in seconds.
        prompts: of its chunks of prompts, (position, tokens).
    """

    step: Step
    output: Output
    chosen: Chosen
    started: float
    prompts: Items[tuple[int, int]] = ()


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
        sequence, params = before.sequence, before.sequence.request.sampling
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else eos))
        if len(ends) > graphs.ENDS or not _goes_on(sequence) or _depends_on_tokens(sequence):
            return None
        work.append(Work(sequence, 1, ends))
    return Step(work)


def _goes_on(sequence: Sequence) -> bool:
    """The next token is not its last one, sees what this one sees, and there is memory for it."""
    following, bound = sequence.position + 1, sequence.turn.next_view(sequence.position)
    if bound is not None and following >= bound:
        return False
    return len(sequence.generated) + 1 < sequence.max_tokens and following < sequence.table.capacity


def _depends_on_tokens(sequence: Sequence) -> bool:
    """Its next token, its end, or what is told of it cannot be known without the ones before."""
    params = sequence.request.sampling
    is_shaped = sequence.request.constraint is not None or params.shapes_logits
    is_watched = params.logprobs is not None or sequence.trace is not None
    return is_shaped or is_watched or bool(params.stop)
