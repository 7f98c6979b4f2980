"""A step as tensors: packed ids, positions, the rows whose logits are wanted, and the context of the forward."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pacellm.engine.scheduler import Step, Work
from pacellm.engine.sequence import Sequence
from pacellm.memory.pool import BankPool
from pacellm.model.context import Banks, Chunk, Piece
from pacellm.rows import ROWS, missing_rows


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        ids, positions: [1, T] int64, padded to a multiple of ``ROWS`` rows.
        wanted: [S] int64 rows whose logits are needed, padded likewise with row 0.
        chunks: one per sequence of the step, in row order.
        sampled: the sequences that get a token, in the order of ``wanted``.
    """

    ids: Tensor
    positions: Tensor
    wanted: Tensor
    chunks: list[Chunk]
    sampled: list[Sequence]


def build(step: Step, pool: BankPool | None, segment: int, device: torch.device) -> Batch:
    """Pack a step."""
    ids, positions, chunks = array("i"), [], []
    wanted: list[int] = []
    sampled: list[Sequence] = []
    for work in step.work:
        sequence, row = work.sequence, len(ids)
        ids.extend(sequence.turn.ids[sequence.cursor : sequence.cursor + work.count])
        positions.append(np.arange(sequence.position, sequence.position + work.count))
        chunks.append(_chunk(work, row, pool, segment))
        if work.count == sequence.pending:
            wanted.append(len(ids) - 1)
            sampled.append(sequence)
    missing = missing_rows(len(ids))
    ids.extend([0] * missing)
    positions.append(np.zeros(missing, dtype=np.int64))
    wanted.extend([0] * (missing_rows(len(wanted)) if wanted else ROWS))
    return Batch(
        ids=_upload(np.frombuffer(ids, dtype=np.int32).astype(np.int64), device)[None],
        positions=_upload(np.concatenate(positions), device)[None],
        wanted=_upload(np.array(wanted, dtype=np.int64), device),
        chunks=chunks,
        sampled=sampled,
    )


def _chunk(work: Work, row: int, pool: BankPool | None, segment: int) -> Chunk:
    sequence, turn = work.sequence, work.sequence.turn
    banks: Banks | None = None
    pieces: tuple[Piece, ...] = ()
    if pool is not None and sequence.row is not None and turn.pa != "off":
        banks = Banks(pool.banks(sequence.row), pool.stages(sequence.row), turn.pa)
        pieces = tuple(turn.pieces(sequence.cursor, work.count, row, segment))
    num_decoded = min(work.count, max(0, sequence.position + work.count - turn.prompt_end))
    return Chunk(
        row,
        row + work.count,
        sequence.position,
        sequence.table.runs(),
        pieces,
        banks,
        num_decoded=num_decoded,
        num_wanted=int(work.count == sequence.pending),
    )


def _upload(numbers: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
