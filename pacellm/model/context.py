"""What the current forward pass works on: the one ambient value of the system.

A patched FFN is called as ``self.mlp(x)`` and gets no keyword, so the step's sequences, KV and banks reach
it, and the attention function, through a context variable that is set around the forward and refuses nesting.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pacellm.config import PRESETS, PAConfig, Preset
from pacellm.memory.expert_counts import ActivityState
from pacellm.memory.similarity import Total
from pacellm.memory.state import BankState, Stage
from pacellm.memory.tokens import DecodedTokens
from pacellm.memory.working_set import SetTable
from pacellm.model.attention.plan import PrefillKernel
from pacellm.modes import PAMode, preset_of, writes
from pacellm.rows import ROWS

KVShape = tuple[tuple[int, int], tuple[int, int]]
"""(kv heads, key size), (kv heads, value size) of a layer."""


@dataclass(frozen=True)
class LayerProbe:
    """What a layer's attention was seen to work on.

    Attributes:
        shapes: of its KV.
        special: names of what it asks beyond a window.
        query_heads: their number.
        window: tokens that a query sees, itself included; None is all.
        key: [Hkv, T, D] keys as they would be stored.
    """

    shapes: KVShape
    special: list[str]
    query_heads: int
    window: int | None
    key: Tensor


@dataclass(frozen=True)
class Run:
    """``length`` tokens of a sequence from ``start``, stored side by side in the slab from ``slot``."""

    start: int
    slot: int
    length: int


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of the packed step, all of one segment; ``ends`` where the segment ends there."""

    start: int
    stop: int
    ends: bool


@dataclass(frozen=True)
class Banks:
    """A sequence's working banks and stages by layer; ``row`` is where they lie in the arena; ``mode`` is not off."""

    banks: dict[int, BankState]
    stages: dict[int, Stage]
    mode: PAMode
    row: int = -1

    @property
    def preset(self) -> Preset:
        """What they are read by."""
        preset = preset_of(self.mode)
        assert preset is not None
        return preset

    @property
    def writes(self) -> bool:
        """They change."""
        return writes(self.mode)

    @property
    def acts(self) -> bool:
        """They change outputs."""
        return self.preset != "observe"


@dataclass(frozen=True)
class Experts:
    """A sequence's expert activity.

    Attributes:
        state, stage: of its working row.
        density: part of the experts that its decoded tokens use.
        sets: by layer [E] bool, the working set as the activity stands; the sequence's own, kept over steps.
        table: where they lie, in ``row``.
    """

    state: ActivityState
    stage: ActivityState
    density: float
    sets: dict[int, Tensor]
    table: SetTable
    row: int


@dataclass
class Asked:
    """What tokens were seen to be.

    Attributes:
        layers: whose queries are wanted.
        queries: of these [H, n, D], turned to their positions. scales: of their scores.
        codes: [n, bits / 8] uint8, where codes are made.
    """

    layers: tuple[int, ...] = ()
    queries: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    codes: Tensor | None = None


@dataclass(frozen=True)
class Chunk:
    """One sequence's part of a step.

    Attributes:
        start, stop: its rows in the packed step.
        position: of its first token among those that it sees, which is its absolute one as long as it sees all.
        runs: where its KV lies, from the first token that it sees, with room for the chunk's own tokens.
        pieces: its rows cut at segment ends.
        banks: None where this request's FFNs are left alone.
        num_decoded: how many of its last rows are decoded tokens, now or in the log that is replayed.
        experts: its expert activity, None without a layout.
        asked: takes what its tokens are seen to be: those of a question, of which nothing else is kept, or one that is
            watched.
    """

    start: int
    stop: int
    position: int
    runs: tuple[Run, ...]
    pieces: tuple[Piece, ...] = ()
    banks: Banks | None = None
    num_decoded: int = 0
    experts: Experts | None = None
    asked: Asked | None = None

    @property
    def prompt_pieces(self) -> tuple[Piece, ...]:
        """Those of its prompt's tokens; each decoded token is a piece of its own behind them."""
        return self.pieces[: len(self.pieces) - self.num_decoded]

    @property
    def counts_experts(self) -> bool:
        """It has prompt tokens, and their experts' activity is counted."""
        return self.experts is not None and self.stop - self.start > self.num_decoded

    @property
    def set_row(self) -> int | None:
        """The row of the table of sets that its decoded tokens use; None where they use all experts."""
        if self.experts is None or self.experts.density == 1.0 or not self.num_decoded:
            return None
        return self.experts.row

    def mask(self, layer: int, inner: int) -> Tensor | None:
        """[F] bool: the neurons that its decoded tokens use in a layer, once that was decided; None where all are."""
        if self.experts is None or self.experts.density == 1.0 or layer not in self.experts.sets:
            return None
        chosen = self.experts.sets[layer]
        return chosen.repeat_interleave(inner // len(chosen))


@dataclass(frozen=True)
class Shared:
    """Sequences of a decode step whose keys begin alike: G groups of up to N members.

    Attributes:
        members: [G, N] int32 rows of the step, -1 where a group has fewer.
        leader: [G] int32, the row whose table is read for all.
        lengths: [G] int32 tokens that the members share; 0 for a group without members, of which there is always one.
        group: [B] int64 each row's group; for rows of none, one without members.
    """

    members: Tensor
    leader: Tensor
    lengths: Tensor
    group: Tensor


@dataclass(frozen=True)
class DecodeRows:
    """One token of each of B sequences, told by tensors alone, so that a captured step serves any content.

    Attributes:
        slots: [B] int64, where each token's KV goes; a slot that nobody owns for padding.
        lengths: [B] int32 tokens that each one sees, itself included.
        tables: [B, W] int32, the first slot of each of a sequence's blocks of ``BLOCK`` tokens.
        tokens: their rows of banks, whose banks take part, and where any token has one, their working sets.
        shared: beginnings that are read once, or None.
        acts: the banks of some token may change its output.
    """

    BLOCK: ClassVar[int] = 512

    slots: Tensor
    lengths: Tensor
    tables: Tensor
    tokens: DecodedTokens
    shared: Shared | None = None
    acts: bool = True


class Observed(NamedTuple):
    """A layer's inner activations [T, F] and bias-free FFN outputs of the rows from ``first``."""

    layer: int
    inner: Tensor
    y: Tensor
    first: int
    total: Total | None


@dataclass
class StepContext:
    """A step: its chunks in row order, the KV slab by layer, and the config of the banks.

    ``keys`` and ``values`` are [kv heads, slots, head size] per layer. ``failing`` is the chunk being worked on,
    so that an error can be laid at one request's door. ``scratch`` is the attention backend's. Where ``probe`` is set,
    attention only records each layer's KV shapes in it. ``wanted`` are the rows that the model's head reads, in order;
    None is all of them. ``arenas`` are all sessions' banks by layer, ``sets`` their working sets. With ``decode`` the
    step is one token of each sequence; a CPU's attention still goes by the chunks. ``deterministic`` fixes how sums are
    split, whatever else is in the step. ``total`` sums over the ranks of a tensor-parallel model. ``kernel`` attends
    prompts' chunks on CUDA; None is flash. ``side_stream`` is for what the step's result does not need.
    A CPU's products have a multiple of ``rows`` rows. ``codes`` [1, slots, bits / 8] are the tokens' codes.
    ``observed`` is what the banks of decoded tokens that are only observed are fed at the end of the step.
    """

    chunks: list[Chunk]
    keys: list[Tensor]
    values: list[Tensor]
    pa: PAConfig = field(default_factory=PAConfig)
    failing: Chunk | None = None
    scratch: dict[str, object] = field(default_factory=dict)
    probe: dict[int, LayerProbe] | None = None
    wanted: list[int] | None = None
    arenas: dict[int, BankState] = field(default_factory=dict)
    sets: SetTable | None = None
    decode: DecodeRows | None = None
    deterministic: bool = False
    total: Total | None = None
    kernel: PrefillKernel | None = None
    side_stream: torch.cuda.Stream | None = None
    rows: int = ROWS
    codes: Tensor | None = None
    observed: list[Observed] = field(default_factory=list)

    @cached_property
    def decoding(self) -> list[tuple[Chunk, Banks]]:
        """Chunks with decoded tokens and banks."""
        return [(chunk, chunk.banks) for chunk in self.chunks if chunk.banks is not None and chunk.num_decoded]

    @cached_property
    def acting(self) -> list[Preset]:
        """Presets of its banks that change outputs."""
        found = {chunk.banks.preset for chunk in self.chunks if chunk.banks is not None and chunk.banks.acts}
        return [preset for preset in PRESETS if preset in found]

    @cached_property
    def observes(self) -> bool:
        """Decoded tokens have banks that change no output."""
        return any(not banks.acts for _, banks in self.decoding)

    def first_row(self, chunk: Chunk, layer: int) -> int:
        """The first of a chunk's rows whose attention in ``layer`` anybody reads; ``chunk.stop`` where nobody does.

        Behind the last layer's attention every row stands for itself, so rows that the head does not read matter only
        to a bank of that layer. At 200K tokens that is half of the bundled model's work, which has two full layers.
        """
        is_read = chunk.banks is not None and layer in chunk.banks.banks
        if self.wanted is None or is_read or chunk.counts_experts or layer + 1 < len(self.keys):
            return chunk.start
        place = bisect_left(self.wanted, chunk.start)
        return min(self.wanted[place], chunk.stop) if place < len(self.wanted) else chunk.stop


_current: ContextVar[StepContext | None] = ContextVar("pacellm_step", default=None)


def current_step() -> StepContext | None:
    """The step around the running forward pass, or None."""
    return _current.get()


@contextmanager
def step_context(step: StepContext) -> Iterator[StepContext]:
    """Set the step for the forward pass inside.

    Raises:
        RuntimeError: a step is already running in this context.
    """
    if _current.get() is not None:
        raise RuntimeError("a step is already running; forward passes of one model cannot nest")
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)
