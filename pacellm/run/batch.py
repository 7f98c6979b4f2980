"""A step as tensors: packed ids, positions, the rows whose logits are wanted, and the context of the forward."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pacellm.engine.sequence import Sequence
from pacellm.engine.step import Step, Work
from pacellm.memory.expert_counts import EXPERTS
from pacellm.memory.pool import BankPool
from pacellm.model.context import Asked, Banks, Chunk, Experts, Piece
from pacellm.modes import preset_of
from pacellm.rows import ROWS, missing_rows
from pacellm.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        ids, positions: [1, T] int64, padded to a multiple of the rows that products want.
        wanted: rows whose logits are needed.
        chunks: one per sequence of the step, in row order.
        sampled: the sequences that get a token, in the order of ``wanted``.
        scored: after those, the sequences whose prompt's next tokens are scored, and by how many rows each.
    """

    ids: Tensor
    positions: Tensor
    wanted: list[int]
    chunks: list[Chunk]
    sampled: list[Sequence]
    scored: list[tuple[Sequence, int]]


def build(step: Step, pool: BankPool | None, segment: int, device: torch.device, multiple: int) -> Batch:
    """Pack a step into a multiple of ``multiple`` rows."""
    ids, positions, chunks = array("i"), [], []
    wanted: list[int] = []
    sampled: list[Sequence] = []
    for work in step.work:
        sequence, row = work.sequence, len(ids)
        ids.extend(sequence.turn.ids[sequence.cursor : sequence.cursor + work.count])
        positions.append(np.arange(sequence.position, sequence.position + work.count))
        chunks.append(_chunk(work, row, pool, segment))
        if work.count == sequence.pending and work.asks is None:
            wanted.append(len(ids) - 1)
            sampled.append(sequence)
    scored = _add_scored(step, wanted)
    missing = missing_rows(len(ids), multiple)
    ids.extend([0] * missing)
    positions.append(np.zeros(missing, dtype=np.int64))
    return Batch(
        ids=to_device(torch.from_numpy(np.frombuffer(ids, dtype=np.int32).astype(np.int64)), device)[None],
        positions=to_device(torch.from_numpy(np.concatenate(positions)), device)[None],
        wanted=wanted,
        chunks=chunks,
        sampled=sampled,
        scored=scored,
    )


def build_chunks(works: list[Work], pool: BankPool | None, segment: int) -> list[Chunk]:
    """One row for each sequence: its next token."""
    return [_chunk(work, row, pool, segment) for row, work in enumerate(works)]


def uses_set(sequence: Sequence) -> bool:
    """Its decoded tokens use a working set."""
    return sequence.row is not None and sequence.turn.density < 1.0


def is_changed(sequence: Sequence) -> bool:
    """Its banks change its outputs."""
    return sequence.row is not None and preset_of(sequence.turn.pa) not in (None, "observe")


def choose_sets(sequences: list[Sequence], pool: BankPool) -> None:
    """Write the working sets that are not known yet, of all layers: a step on static buffers only reads them."""
    if pool.sets is None or pool.experts is None:
        return
    for sequence in sequences:
        if sequence.row is not None and uses_set(sequence) and len(sequence.working_sets) < pool.experts[0]:
            activity = cast(Any, pool.banks(sequence.row)[EXPERTS]).activity
            sequence.working_sets.update(pool.sets.write_all(sequence.row, activity, sequence.turn.density))


def padded(rows: list[int], device: torch.device, multiple: int = ROWS) -> Tensor:
    """[R] int64 on the device, at least ``multiple`` of them and a multiple: what is missing is row 0."""
    missing = missing_rows(len(rows), multiple) if rows else multiple
    return to_device(torch.tensor([*rows, *[0] * missing]), device)


def _add_scored(step: Step, wanted: list[int]) -> list[tuple[Sequence, int]]:
    """Rows that predict a prompt token not scored yet, for requests that want its log-probability."""
    scored, row = [], 0
    for work in step.work:
        sequence = work.sequence
        if sequence.request.sampling.prompt_logprobs is not None and work.asks is None:
            first = max(sequence.position, sequence.num_scored)
            end = min(sequence.position + work.count, len(sequence.prompt) - 1)
            if first < end:
                wanted.extend(range(row + first - sequence.position, row + end - sequence.position))
                scored.append((sequence, end - first))
        row += work.count
    return scored


def _asked(work: Work) -> Asked | None:
    if work.asks is not None:
        return Asked(work.asks)
    return Asked(work.watched) if work.watched else None


def _chunk(work: Work, row: int, pool: BankPool | None, segment: int) -> Chunk:
    sequence, turn = work.sequence, work.sequence.turn
    banks: Banks | None = None
    pieces: tuple[Piece, ...] = ()
    experts: Experts | None = None
    if pool is not None and sequence.row is not None and work.asks is None:
        owned, preset = pool.banks(sequence.row), preset_of(turn.pa)
        if preset is not None:
            banks = Banks(owned, pool.stages(sequence.row, preset), turn.pa, sequence.row)
        if pool.sets is not None:
            state, stage = cast(Any, owned[EXPERTS]), cast(Any, pool.stages(sequence.row)[EXPERTS])
            experts = Experts(state, stage, turn.density, sequence.working_sets, pool.sets, sequence.row)
        pieces = tuple(turn.pieces(work.cursor, work.count, row, segment))
    num_decoded = min(work.count, max(0, work.position + work.count - turn.prompt_end))
    return Chunk(
        row,
        row + work.count,
        work.place,
        sequence.table.runs(),
        pieces,
        banks,
        num_decoded=num_decoded,
        experts=experts,
        asked=_asked(work),
    )
