"""Tensors through the model: the KV slab, the forward pass, the logits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Copy, Step, Work
from pacellm.errors import EngineError
from pacellm.kv.blocks import KVTable, blocks_for
from pacellm.memory.pool import BankPool
from pacellm.model.attention.dispatch import slab
from pacellm.model.attention.plan import PrefillKernel
from pacellm.model.context import Asked, Chunk, DecodeRows, StepContext, step_context
from pacellm.model.ffn import observe
from pacellm.model.load import LoadedModel
from pacellm.model.retrieval import Coder, attach
from pacellm.model.side_stream import join_side_stream
from pacellm.modes import preset_of
from pacellm.rows import ROWS, missing_rows
from pacellm.run import batch, graphs
from pacellm.view import BLOCK

logger = logging.getLogger("pacellm.engine")


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
        asked: by sequence, what its question was seen to be in the layers that an index looks at.
        is_ahead: the step was fed tokens that the sequences do not know of yet.
    """

    logits: Tensor
    sampled: list[Sequence]
    scored: list[tuple[Sequence, int]]
    is_ahead: bool = False
    asked: dict[str, Asked] = field(default_factory=dict)

    def num_generated(self, sequence: Sequence) -> int:
        """Tokens that a sampled sequence was given before this one."""
        return len(sequence.generated) + self.is_ahead


class Runner:
    """Runs steps of one model.

    Args:
        model: loaded and, with PA, patched.
        pool: the banks, or None without PA.
        num_blocks: KV blocks of the slab.
        pa: the banks' config.
        deterministic: sums are split the same whatever else is in a step.
        kernel: of prompts' chunks on CUDA; None is flash.
        rows: steps are padded to a multiple of them.
        coder: makes the tokens' codes; None where nobody asks for them.

    Attributes:
        codes: digest of how it makes them; "" without.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: BankPool | None,
        num_blocks: int,
        pa: PAConfig,
        *,
        deterministic: bool = False,
        kernel: PrefillKernel | None = None,
        rows: int = ROWS,
        coder: Coder | None = None,
    ) -> None:
        self.rows = rows
        self.model, self.pool, self.pa, self.deterministic, self.kernel = model, pool, pa, deterministic, kernel
        self.decoder: graphs.Decoder | None = None
        self._side_stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        slots = num_blocks * BLOCK + ROWS  # the last ones are nobody's: what pads a step is written there
        self._keys = slab([shape[0] for shape in model.kv_shapes], slots, model.dtype, model.device)
        self._values = slab([shape[1] for shape in model.kv_shapes], slots, model.dtype, model.device)
        self.codes = "" if coder is None else coder.digest
        self._codes = [] if coder is None else slab([(1, coder.size)], slots, torch.uint8, model.device)
        if coder is not None:
            attach(model.module, coder)

    @property
    def slabs(self) -> list[Tensor]:
        """KV memory, each [heads, slots, size]: keys of all layers, then values, then codes where they are made."""
        return [*self._keys, *self._values, *self._codes]

    def use_static_decode(self, *, max_seqs: int, max_tokens: int, capture: bool) -> None:
        """Run steps that only decode on static buffers; with ``capture`` as CUDA graphs."""
        self.decoder = graphs.Decoder(
            self._forward_decoded,
            self.model.device,
            max_seqs=max_seqs,
            width=blocks_for(max_tokens),
            dump=self._keys[0].shape[1] - 1,
            scratch_row=self.pool.scratch_row if self.pool is not None else 0,
            capture=capture,
        )

    def run(self, step: Step) -> Output:
        """One forward pass.

        Raises:
            StepFailed: names the sequence where it can.
        """
        if self.decoder is not None and graphs.fits(step):
            try:
                return self._run_decoder(self.decoder, step)
            except graphs.CaptureFailed as error:
                logger.warning("CUDA graphs are off, decoding is slower: %s", error)
                self.decoder = None
        try:
            packed = batch.build(step, self.pool, self.pa.segment, self.model.device, self.rows)
        except torch.OutOfMemoryError as error:  # for the stage of a first request by `paper`
            by_paper = (work.sequence for work in step.work if preset_of(work.sequence.turn.pa) == "paper")
            raise StepFailed(f"no memory for its stage: {error}", next(by_paper, None)) from error
        logits = self.forward(step, packed, packed.wanted)
        asked = {
            work.sequence.id: chunk.asked
            for work, chunk in zip(step.work, packed.chunks, strict=True)
            if chunk.asked is not None
        }
        return Output(logits, packed.sampled, packed.scored, asked=asked)

    def run_ahead(self, step: Step, tokens: Tensor) -> Output | None:
        """One decode pass on tokens [S] that are still being chosen on the device; None where it cannot be run so.

        Raises:
            StepFailed: names no sequence.
        """
        if self.decoder is None:
            return None
        try:
            return self._run_decoder(self.decoder, step, tokens)
        except graphs.CaptureFailed:
            return None  # the step as an ordinary one says why

    @torch.inference_mode()
    def forward(self, step: Step, packed: batch.Batch, rows: list[int]) -> Tensor:
        """Logits [R, V], in float32 or wider, of R ``rows`` of a packed step.

        Raises:
            StepFailed: names the sequence where it can.
        """
        context = self._context(packed.chunks, wanted=sorted(set(rows)))
        try:
            self._copy(step.copies)
            kept = batch.padded(rows, self.model.device, self.rows)
            with step_context(context):
                output = self.model.module(
                    input_ids=packed.ids,
                    position_ids=packed.positions,
                    use_cache=False,
                    logits_to_keep=kept,
                )
                observe(context)
        except Exception as error:
            raise StepFailed(f"{type(error).__name__}: {error}", _blame(step, packed, context)) from error
        logits = output.logits[0, : len(rows)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _context(self, chunks: list[Chunk], **more: Any) -> StepContext:
        total = self.model.ranks.total if self.model.ranks is not None else None
        arenas = self.pool.arena if self.pool is not None else {}
        return StepContext(
            chunks,
            self._keys,
            self._values,
            self.pa,
            arenas=arenas,
            sets=self.pool.sets if self.pool is not None else None,
            deterministic=self.deterministic,
            total=total,
            kernel=self.kernel,
            rows=self.rows,
            codes=self._codes[0] if self._codes else None,
            **more,
        )

    @torch.inference_mode()
    def _run_decoder(self, decoder: graphs.Decoder, step: Step, tokens: Tensor | None = None) -> Output:
        sequences = [work.sequence for work in step.work]
        try:
            self._copy(step.copies)
            step.copies = []
            if self.pool is not None:
                batch.choose_sets(sequences, self.pool)
            logits = decoder.run(step.work, tokens)
        except graphs.CaptureFailed:
            raise
        except Exception as error:
            blamed = sequences[0] if len(sequences) == 1 else None
            raise StepFailed(f"{type(error).__name__}: {error}", blamed) from error
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return Output(logits, sequences, [], is_ahead=tokens is not None)

    def _forward_decoded(self, buffers: graphs.Buffers, rows: DecodeRows, works: list[Work]) -> Tensor:
        """[B, V] of a bucket's buffers. A CPU's attention wants to be told of the sequences."""
        on_cpu = self.model.device.type == "cpu"
        chunks = batch.build_chunks(works, self.pool, self.pa.segment) if on_cpu else []
        ids, positions, kept = buffers.ids, buffers.positions, buffers.kept
        missing = missing_rows(buffers.size) if on_cpu else 0
        if missing:
            raise ValueError(f"on a CPU buckets are multiples of {ROWS} sequences, not {buffers.size}")
        with step_context(self._context(chunks, decode=rows, side_stream=self._side_stream)) as step:
            output = self.model.module(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=kept)
            join_side_stream(step)
        return output.logits[0]

    def scrub(self, table: KVTable) -> None:
        """Zero a failed sequence's KV, so that no non-finite number stays behind in a masked slot."""
        for run in table.runs():
            for slabs in self.slabs:
                slabs[:, run.slot : run.slot + run.length] = 0

    @torch.inference_mode()
    def copy(self, copies: list[Copy]) -> None:
        """Copy KV between slots now."""
        self._copy(copies)

    def _copy(self, copies: list[Copy]) -> None:
        for copy in copies:
            for slabs in self.slabs:
                source = slabs[:, copy.source : copy.source + copy.length]
                slabs[:, copy.target : copy.target + copy.length] = source


def _blame(step: Step, packed: batch.Batch, context: StepContext) -> Sequence | None:
    if context.failing is not None:
        return step.work[packed.chunks.index(context.failing)].sequence
    return step.work[0].sequence if len(step.work) == 1 else None
