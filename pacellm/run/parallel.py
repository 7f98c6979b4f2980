"""A tensor-parallel engine: the leader schedules and samples, the other ranks do what it does to tensors.

Every rank holds its part of the weights, of KV (its heads) and of banks (keys are split along the inner activations;
values, usage and counters are the same everywhere). The leader tells the others, in order, of every step and of every
change of KV and banks between steps. A rank that fails or dies ends the service: the others hold no state of their own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.engine.step import Copy, Step
from pacellm.errors import EngineDead
from pacellm.kv.blocks import KVTable
from pacellm.memory.effective_rank import rank_of_gram
from pacellm.memory.pool import BankPool, BankShape
from pacellm.model.attention import prefill as prefill_kernels
from pacellm.model.context import Banks, Chunk
from pacellm.model.load import LoadedModel
from pacellm.model.neurons import ffns
from pacellm.model.patch import is_split, patch, unpatch
from pacellm.model.ranks import Ranks
from pacellm.modes import PAMode, preset_of
from pacellm.run import batch
from pacellm.run.runner import Runner


@dataclass(frozen=True)
class Patch:
    """An engine is being made on the leader: these layers get banks, None without PA."""

    layers: tuple[int, ...] | None


@dataclass(frozen=True)
class Begin:
    """Sizes of everything, after the layers were patched; ``kernel`` is the attention kernel's name, None on a CPU."""

    bank: PAConfig
    num_rows: int
    num_stages: int
    num_blocks: int
    deterministic: bool
    kernel: str | None


@dataclass(frozen=True)
class Forward:
    """A step; ``owners`` are bank rows and modes of the chunks, or None."""

    ids: list[int]
    positions: list[int]
    wanted: list[int]
    chunks: list[Chunk]
    owners: list[tuple[int, PAMode] | None]
    copies: list[Copy]


@dataclass(frozen=True)
class Prepare:
    """A bank row is given out."""

    row: int
    stage: int | None
    source: int | None


@dataclass(frozen=True)
class CopyKV:
    """KV is copied between steps."""

    copies: list[Copy]


@dataclass(frozen=True)
class Scrub:
    """A failed sequence's KV is zeroed."""

    blocks: list[int]


@dataclass(frozen=True)
class Grams:
    """The keys of a row are compared with each other."""

    row: int


class SharedPool(BankPool):
    """Banks of which each rank holds a part.

    Args:
        split: layers whose keys are split.
        leads: tell the other ranks.
    """

    def __init__(self, ranks: Ranks, split: frozenset[int], leads: bool, *args: Any, **kwargs: Any) -> None:
        self._ranks, self._split, self._leads = ranks, split, leads
        super().__init__(*args, **kwargs)

    def prepare(self, row: int, stage: int | None, source: int | None) -> None:
        """As in one process, on every rank."""
        if self._leads:
            tell(self._ranks, Prepare(row, stage, source))
        super().prepare(row, stage, source)

    def effective_ranks(self, row: int) -> dict[int, float]:
        """As in one process, from all parts of the keys."""
        if self._leads:
            tell(self._ranks, Grams(row))
        found = {}
        for layer, bank in self.banks(row).items():
            filled = int(bank.filled)
            keys = bank.keys[:filled].to(torch.float64)
            gram = keys @ keys.T
            if layer in self._split:
                gram = self._ranks.total(gram)
            lengths = gram.diagonal().sqrt().clamp(min=1e-12)
            found[layer] = rank_of_gram(gram / lengths[:, None] / lengths) if filled else 0.0
        return found


class LeadingRunner(Runner):
    """The leader's: what it does, all ranks do."""

    def forward(self, step: Step, packed: batch.Batch, rows: list[int]) -> Tensor:
        """As in one process.

        Raises:
            EngineDead: this rank or another failed; the ranks are no longer in step.
        """
        owners = [None if chunk.banks is None else (chunk.banks.row, chunk.banks.mode) for chunk in packed.chunks]
        chunks = [dataclasses.replace(chunk, banks=None) for chunk in packed.chunks]
        ids, positions = packed.ids[0].tolist(), packed.positions[0].tolist()
        tell(self._group, Forward(ids, positions, rows, chunks, owners, step.copies))
        try:
            return super().forward(step, packed, rows)
        except Exception as error:
            raise EngineDead(f"a tensor-parallel step failed, so its ranks are out of step: {error}") from error

    def scrub(self, table: KVTable) -> None:
        """As in one process, on every rank."""
        tell(self._group, Scrub(table.blocks))
        super().scrub(table)

    def copy(self, copies: list[Copy]) -> None:
        """As in one process, on every rank."""
        if copies:
            tell(self._group, CopyKV(copies))
        super().copy(copies)

    @property
    def _group(self) -> Ranks:
        assert self.model.ranks is not None
        return self.model.ranks


def tell(ranks: Ranks, message: object) -> None:
    """Send a message to the other ranks.

    Raises:
        EngineDead: one of them is gone.
    """
    try:
        ranks.send(message)
    except RuntimeError as error:
        raise EngineDead(f"a tensor-parallel rank is gone: {error}") from error


def new_pool(model: LoadedModel, shapes: list[BankShape], begin: Begin, *, leads: bool) -> SharedPool:
    """This rank's part of the banks of a patched model."""
    assert model.ranks is not None
    split = frozenset(ffn.layer for ffn in ffns(model.module) if ffn is not None and is_split(ffn))
    return SharedPool(
        model.ranks, split, leads, begin.bank, shapes, num_rows=begin.num_rows, num_stages=begin.num_stages,
        dtype=model.dtype, device=model.device,
    )  # fmt: skip


def follow(model: LoadedModel) -> None:
    """Do what the leader says, until it says None."""
    assert model.ranks is not None
    follower = Follower(model)
    while (message := model.ranks.receive()) is not None:
        follower.take(message)


class Follower:
    """What a rank other than the leader's does to its tensors.

    Args:
        model: this rank's part.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._shapes: list[BankShape] | None = None
        self._pool: SharedPool | None = None
        self._runner: Runner | None = None

    def take(self, message: object) -> None:
        """Do what one message says.

        Raises:
            RuntimeError: it comes before what it is about was made.
        """
        match message:
            case Patch():
                self._patch(message)
            case Begin():
                self._begin(message)
            case Prepare() | Grams() if self._pool is not None:
                self._change_banks(message, self._pool)
            case Forward() | CopyKV() | Scrub() if self._runner is not None:
                self._run(message, self._runner)
            case _:
                raise RuntimeError(f"{type(message).__name__} before Begin")

    def _patch(self, message: Patch) -> None:
        unpatch(self._model.module)
        layers = message.layers
        self._shapes = None if layers is None else patch(self._model.module, layers, self._model.ranks)

    def _begin(self, message: Begin) -> None:
        model, shapes = self._model, self._shapes
        self._pool = None if shapes is None else new_pool(model, shapes, message, leads=False)
        kernel = None if message.kernel is None else prefill_kernels.load(message.kernel)
        self._runner = Runner(
            model, self._pool, message.num_blocks, message.bank, deterministic=message.deterministic, kernel=kernel
        )

    def _change_banks(self, message: Prepare | Grams, pool: SharedPool) -> None:
        if isinstance(message, Prepare):
            pool.prepare(message.row, message.stage, message.source)
        else:
            pool.effective_ranks(message.row)

    def _run(self, message: Forward | CopyKV | Scrub, runner: Runner) -> None:
        match message:
            case Forward():
                packed = _unpacked(message, self._pool, self._model.device)
                runner.forward(Step([], message.copies), packed, message.wanted)
            case CopyKV():
                runner.copy(message.copies)
            case Scrub():
                runner.scrub(KVTable(message.blocks))


def _unpacked(message: Forward, pool: SharedPool | None, device: torch.device) -> batch.Batch:
    chunks = []
    for chunk, owner in zip(message.chunks, message.owners, strict=True):
        banks = None
        if owner is not None and pool is not None:
            row, mode = owner
            banks = Banks(pool.banks(row), pool.stages(row, preset_of(mode) or "observe"), mode, row)
        chunks.append(dataclasses.replace(chunk, banks=banks))
    ids, positions = (torch.tensor([numbers], device=device) for numbers in (message.ids, message.positions))
    return batch.Batch(ids, positions, message.wanted, chunks, [], [])
