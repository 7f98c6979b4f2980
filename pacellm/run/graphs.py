"""Decode steps on static buffers, captured as CUDA graphs: one for each rounded number of sequences and kind of step.

A step of one token for each of B sequences differs from the last only in what tensors hold: ids, positions, where KV
goes and lies, rows of banks. These are written into buffers that stay, and the forward pass is replayed. What pads a
step up to its bucket writes into KV and bank rows that nobody owns. On a CPU the same step runs without capture, which
is how it is tested.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pacellm.config import PRESETS
from pacellm.engine.step import Step, Work
from pacellm.memory.tokens import DecodedTokens
from pacellm.model.context import DecodeRows, Shared
from pacellm.modes import preset_of, writes
from pacellm.run.batch import is_changed, uses_set
from pacellm.view import BLOCK

logger = logging.getLogger("pacellm.engine")


class CaptureFailed(Exception):
    """A decode step cannot be captured on this machine."""


ENDS = 8  # ids that may end an answer, of a row whose token the host has not seen
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
MEMBERS = 16  # sequences of one shared beginning; more make further groups
_LEAST_SHARED = 4 * BLOCK  # tokens; shorter beginnings are read by each sequence


def fits(step: Step) -> bool:
    """Every sequence of the step is fed one decoded token, and gets the next."""
    return bool(step.work) and all(
        work.count == 1
        and not work.watched
        and work.sequence.pending == 1
        and work.sequence.position >= work.sequence.turn.prompt_end
        and work.sequence.request.sampling.prompt_logprobs is None
        for work in step.work
    )


@dataclass(frozen=True)
class Group:
    """Rows of a step whose tables begin with the same ``blocks`` blocks."""

    rows: tuple[int, ...]
    blocks: int


def shared_groups(tables: Items[Items[int]], lengths: Items[int], least: int = _LEAST_SHARED) -> list[Group]:
    """Sequences that begin with the same blocks: at most ``MEMBERS`` a group, sharing at least ``least`` tokens.

    Only blocks that lie wholly before every member's last token are shared.
    """
    by_first: dict[int, list[int]] = {}
    for row, table in enumerate(tables):
        by_first.setdefault(table[0], []).append(row)
    groups = []
    for rows in by_first.values():
        for start in range(0, len(rows), MEMBERS):
            members = rows[start : start + MEMBERS]
            blocks = _common([tables[row][: (lengths[row] - 1) // BLOCK] for row in members])
            if len(members) > 1 and blocks * BLOCK >= least:
                groups.append(Group(tuple(members), blocks))
    return groups


def _common(tables: list[Items[int]]) -> int:
    shortest, longest = min(tables, key=tuple), max(tables, key=tuple)  # as texts are: what these two share, all share
    for number, (one, other) in enumerate(zip(shortest, longest, strict=False)):
        if one != other:
            return number
    return min(len(shortest), len(longest))


class Kind(NamedTuple):
    """What a step has beside its rows: shared beginnings, working sets, banks that change outputs. Each kind is a graph
    of its own."""

    is_shared: bool
    has_sets: bool
    acts: bool


class Buffers:
    """The static tensors of one bucket, and what fills them.

    Args:
        size: sequences.
        width: blocks of the longest context.
        dump: a KV slot that nobody owns. scratch_row: a row of banks that nobody owns; among working sets it is an
            empty one, and the next is of all experts.
    """

    def __init__(self, size: int, width: int, device: torch.device, *, dump: int, scratch_row: int) -> None:
        self.size, self._dump, self._scratch = size, dump, scratch_row
        # two, filled in turn: the device may still be reading the one of the step before
        self._hosts = [_Host.new(size, width, pin=device.type == "cuda") for _ in range(2)]
        device_side = _Host.new(size, width, device=device)
        self._wide, self._narrow = device_side.wide, device_side.narrow
        ids, positions, slots, rows, live, writes, group, self._sets, presets = self._wide
        lengths, leader, shared, *_ = self._narrow
        self.ids, self.positions = ids[None], positions[None]
        self._flags = torch.zeros(2, size, dtype=torch.bool, device=device)
        self._live, self._writes = live, writes
        members, tables = device_side.members, device_side.tables
        self._members, self._tables, self._ends = members, tables, device_side.ends
        tokens = DecodedTokens(rows, self._flags[0], self._flags[1], presets)
        sharing = Shared(members, leader, shared, group)
        self.apart = DecodeRows(slots, lengths, tables, tokens)
        self.sharing = DecodeRows(slots, lengths, tables, tokens, sharing)
        self.kept = torch.arange(size, device=device)
        self.fill([])

    def rows(self, kind: Kind) -> DecodeRows:
        """What a step of that kind is told."""
        rows = replace(self.sharing if kind.is_shared else self.apart, acts=kind.acts)
        return replace(rows, tokens=rows.tokens._replace(sets=self._sets)) if kind.has_sets else rows

    def fill(self, works: list[Work], groups: Items[Group] = (), tokens: Tensor | None = None) -> None:
        """Take what the step is made of. Nothing waits for the device.

        Args:
            works: one token of each sequence.
            groups: of their rows, those with shared beginnings.
            tokens: [B] what is fed, still on the device, where ``works`` have ``ends``; -1 ends a row as those do.
        """
        self._hosts.reverse()
        host = self._hosts[0]
        wide, narrow, tables = host.wide.numpy(), host.narrow.numpy(), host.tables.numpy()
        wide[:], narrow[:] = 0, 0
        narrow[0], wide[2], wide[3], wide[7] = 1, self._dump, self._scratch, self._scratch
        tables[:, 0] = self._dump
        host.members.fill_(-1)
        for row, work in enumerate(works):
            sequence, position, blocks = work.sequence, work.position, work.sequence.table.blocks
            wide[0, row], wide[1, row] = sequence.turn.ids[work.cursor] if work.ends is None else 0, position
            place = work.place
            wide[2, row] = blocks[place // BLOCK] * BLOCK + place % BLOCK
            narrow[0, row] = place + 1
            tables[row, : len(blocks)] = np.asarray(blocks, dtype=np.int32) * BLOCK
            preset = preset_of(sequence.turn.pa)
            if sequence.row is not None and preset is not None:
                wide[3, row], wide[4, row], wide[5, row] = sequence.row, 1, writes(sequence.turn.pa)
                wide[8, row] = PRESETS.index(preset)
            wide[7, row] = sequence.row if uses_set(sequence) else self._scratch + 1
        for number, group in enumerate(groups, start=1):  # group 0 has no members and no length
            narrow[1, number], narrow[2, number] = group.rows[0], group.blocks * BLOCK
            host.members.numpy()[number, : len(group.rows)] = group.rows
            wide[6, list(group.rows)] = number
        for target, source in (
            (self._wide, host.wide), (self._narrow, host.narrow), (self._tables, host.tables),
            (self._members, host.members),
        ):  # fmt: skip
            target.copy_(source, non_blocking=True)
        if tokens is not None:
            self._follow(works, tokens, host)
        self._flags[0].copy_(self._live)
        self._flags[1].copy_(self._writes)

    def _follow(self, works: list[Work], tokens: Tensor, host: _Host) -> None:
        """Feed tokens that only the device knows; rows whose answer they end do nothing, as padding does."""
        host.ends.fill_(-1)
        for row, work in enumerate(works):
            ends = work.ends or ()
            host.ends.numpy()[row, : len(ends)] = ends
        self._ends.copy_(host.ends, non_blocking=True)
        count = len(works)
        ended = (tokens[:, None] == self._ends[:count]).any(1)
        # slots, rows, live, writes, sets
        for number, value in ((2, self._dump), (3, self._scratch), (4, 0), (5, 0), (7, self._scratch)):
            self._wide[number, :count].masked_fill_(ended, value)
        self._wide[0, :count] = tokens.masked_fill(ended, 0)


@dataclass(frozen=True)
class _Host:
    """Numbers of a bucket. ``wide`` int64 [9, B]: ids, positions, slots, rows, live, writes, group, sets, presets.
    ``narrow`` int32 [3, B]: lengths, then leaders and lengths of groups, of which there are at most 1 + B // 2.
    ``members`` [B, N] and ``tables`` [B, W] int32, ``ends`` [B, ``ENDS``] int64."""

    wide: Tensor
    narrow: Tensor
    members: Tensor
    tables: Tensor
    ends: Tensor

    @classmethod
    def new(cls, size: int, width: int, *, pin: bool = False, device: torch.device | None = None) -> _Host:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=pin)

        return cls(
            wide=zeros(9, size, dtype=torch.int64),
            narrow=zeros(3, size, dtype=torch.int32),
            members=zeros(max(1, size), MEMBERS, dtype=torch.int32),
            tables=zeros(size, width, dtype=torch.int32),
            ends=zeros(size, ENDS, dtype=torch.int64),
        )


DecodePass = Callable[[Buffers, DecodeRows, list[Work]], Tensor]


class Decoder:
    """Runs decode steps on static buffers.

    Args:
        forward: buffers, their rows and the step's work to logits [B, V]; what it does is captured.
        max_seqs: sequences of the largest step.
        width: blocks of the longest context.
        dump, scratch_row: KV slot and bank row that nobody owns.
        capture: replay CUDA graphs; without, the forward pass is run each time.
    """

    def __init__(
        self, forward: DecodePass, device: torch.device, *, max_seqs: int, width: int, dump: int, scratch_row: int,
        capture: bool,
    ) -> None:  # fmt: skip
        self._forward, self._device, self._capture = forward, device, capture
        sizes = [size for size in BUCKETS if size < max_seqs]
        sizes += [next((size for size in BUCKETS if size >= max_seqs), max_seqs)]
        self._buckets = sizes
        self._settings = (width, device)
        self._places = {"dump": dump, "scratch_row": scratch_row}
        self._buffers: dict[int, Buffers] = {}
        self._graphs: dict[tuple[int, Kind], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    def run(self, works: list[Work], tokens: Tensor | None = None) -> Tensor:
        """Logits [B, V] of one token for each sequence; on a GPU a buffer that the next step overwrites.

        Args:
            works, tokens: as :meth:`Buffers.fill` takes them.

        Raises:
            CaptureFailed: nothing was run.
        """
        size = next(size for size in self._buckets if size >= len(works))
        buffers = self._buffers.get(size)
        if buffers is None:
            buffers = self._buffers[size] = Buffers(size, *self._settings, **self._places)  # type: ignore[arg-type]
        graph = None
        groups = _groups(works)
        sequences = [work.sequence for work in works]
        kind = Kind(bool(groups), any(map(uses_set, sequences)), any(map(is_changed, sequences)))
        if self._capture:  # before the buffers are filled: a capture runs on padding alone
            try:
                graph = self._graphs.get((size, kind)) or self._record(size, buffers, kind)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise CaptureFailed(f"{type(error).__name__}: {error}") from error
        buffers.fill(works, groups, tokens)
        if graph is not None:
            graph[0].replay()
            return graph[1][: len(works)]
        return self._forward(buffers, buffers.rows(kind), works)[: len(works)]

    def _record(self, size: int, buffers: Buffers, kind: Kind) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Warm up on a side stream and capture, with nothing but padding in the buffers."""
        rows = buffers.rows(kind)
        buffers.fill([])
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(buffers, rows, [])
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(buffers, rows, [])
        self._pool = self._pool or graph.pool()
        self._graphs[size, kind] = graph, logits
        more = zip((", shared beginnings", ", working sets", ", banks that act"), kind, strict=True)
        logger.info("captured decode steps of up to %d sequences%s", size, "".join(name for name, has in more if has))
        return graph, logits


def _groups(works: list[Work]) -> list[Group]:
    tables = [work.sequence.table.blocks for work in works]
    return shared_groups(tables, [work.place + 1 for work in works])
