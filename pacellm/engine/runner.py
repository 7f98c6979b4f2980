"""Tensors through the model: the KV slab, the forward pass, the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.engine import batch
from pacellm.engine.kv import BLOCK, KVTable
from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Copy, Step
from pacellm.errors import EngineError
from pacellm.memory.pool import BankPool
from pacellm.model.attention import slab
from pacellm.model.context import StepContext, step_context
from pacellm.model.load import LoadedModel


class StepFailed(EngineError):
    """A forward pass failed; ``sequence`` is the one it failed on, or None where that is not known."""

    def __init__(self, message: str, sequence: Sequence | None) -> None:
        super().__init__(message)
        self.sequence = sequence


@dataclass(frozen=True)
class Output:
    """What a forward pass gave.

    Attributes:
        logits: [S + P, V] in float32 or wider: a row for each sampled sequence, then those of scored prompt tokens.
        sampled: the S sequences that get a token.
        scored: sequences with the number of their rows, P together.
    """

    logits: Tensor
    sampled: list[Sequence]
    scored: list[tuple[Sequence, int]]


class Runner:
    """Runs steps of one model.

    Args:
        model: loaded and, with PA, patched.
        pool: the banks, or None without PA.
        num_blocks: KV blocks of the slab.
        pa: the banks' config.
    """

    def __init__(self, model: LoadedModel, pool: BankPool | None, num_blocks: int, pa: PAConfig) -> None:
        self.model, self.pool, self.pa = model, pool, pa
        slots = num_blocks * BLOCK
        self._keys = slab([shape[0] for shape in model.kv_shapes], slots, model.dtype, model.device)
        self._values = slab([shape[1] for shape in model.kv_shapes], slots, model.dtype, model.device)

    @property
    def slabs(self) -> list[Tensor]:
        """KV memory: the keys of all layers, then the values; each [heads, slots, size]."""
        return [*self._keys, *self._values]

    def run(self, step: Step) -> Output:
        """One forward pass.

        Raises:
            StepFailed: names the sequence where it can.
        """
        packed = batch.build(step, self.pool, self.pa.segment, self.model.device)
        return Output(self.forward(step, packed, packed.wanted), packed.sampled, packed.scored)

    @torch.inference_mode()
    def forward(self, step: Step, packed: batch.Batch, rows: list[int]) -> Tensor:
        """Logits [R, V], in float32 or wider, of R ``rows`` of a packed step.

        Raises:
            StepFailed: names the sequence where it can.
        """
        context = StepContext(packed.chunks, self._keys, self._values, self.pa, wanted=sorted(set(rows)))
        try:
            self._copy(step.copies)
            kept = batch.padded(rows, self.model.device)
            with step_context(context):
                output = self.model.module(
                    input_ids=packed.ids,
                    position_ids=packed.positions,
                    use_cache=False,
                    logits_to_keep=kept,
                )
        except Exception as error:
            raise StepFailed(f"{type(error).__name__}: {error}", _blame(step, packed, context)) from error
        logits = output.logits[0, : len(rows)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def scrub(self, table: KVTable) -> None:
        """Zero a failed sequence's KV, so that no non-finite number stays behind in a masked slot."""
        for run in table.runs():
            for slabs in (*self._keys, *self._values):
                slabs[:, run.slot : run.slot + run.length] = 0

    @torch.inference_mode()
    def copy(self, copies: list[Copy]) -> None:
        """Copy KV between slots now."""
        self._copy(copies)

    def _copy(self, copies: list[Copy]) -> None:
        for copy in copies:
            for slabs in (*self._keys, *self._values):
                source = slabs[:, copy.source : copy.source + copy.length]
                slabs[:, copy.target : copy.target + copy.length] = source


def _blame(step: Step, packed: batch.Batch, context: StepContext) -> Sequence | None:
    if context.failing is not None:
        return step.work[packed.chunks.index(context.failing)].sequence
    return step.work[0].sequence if len(step.work) == 1 else None
