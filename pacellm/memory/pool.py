"""The arena of banks: one row holds one session's banks for all patched layers, and rows are reused.

Rows are handed out cleared or copied, never with a former owner's content. A working row also owns a
stage per layer, for the segment that is not yet complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacellm.config import PAConfig, Preset
from pacellm.errors import EngineError
from pacellm.memory.effective_rank import effective_rank
from pacellm.memory.expert_counts import EXPERTS, ActivityState
from pacellm.memory.state import COUNTERS, BankState, Stage, copy_banks, new_stage
from pacellm.memory.working_set import SetTable


@dataclass(frozen=True)
class BankShape:
    """A patched layer's sizes: ``inner`` F and ``hidden`` H."""

    layer: int
    inner: int
    hidden: int


class BankPool:
    """Preallocated bank rows.

    Args:
        config: the banks' config.
        shapes: one per patched layer.
        num_rows: rows in all; ``num_stages`` of them can be written at a time.
        dtype, device: of keys and values.
        heat: [L, E] of a layout: rows hold its experts' activity too, under ``EXPERTS``, and have working sets.
    """

    def __init__(
        self,
        config: PAConfig,
        shapes: list[BankShape],
        *,
        num_rows: int,
        num_stages: int,
        dtype: torch.dtype,
        device: torch.device,
        heat: Tensor | None = None,
    ) -> None:
        self.config, self.shapes, self.num_rows = config, shapes, num_rows
        self.experts = None if heat is None else (len(heat), heat.shape[1])
        self.sets = None if heat is None else SetTable(heat, num_rows, device)
        self._arena: dict[int, Any] = {
            shape.layer: _new_arena(config, shape, num_rows + 1, dtype, device) for shape in shapes
        }
        usual = config.of("observe")
        self._stages: list[dict[int, Any]] = [
            {shape.layer: new_stage(usual, shape.inner, shape.hidden, dtype, device) for shape in shapes}
            for _ in range(num_stages)
        ]
        self._paper_stages: dict[int, dict[int, Any]] = {}
        if heat is not None:
            self._add_activity(heat.shape, device)
        self._free = list(reversed(range(num_rows)))
        self._free_stages = list(range(num_stages))
        self._stage_of: dict[int, int] = {}
        self._views: list[dict[int, Any]] = [
            {layer: type(arena)(*(tensor[row] for tensor in arena)) for layer, arena in self._arena.items()}
            for row in range(num_rows)
        ]

    def _add_activity(self, shape: torch.Size, device: torch.device) -> None:
        counts = torch.zeros(self.num_rows + 1, *shape, dtype=torch.int64, device=device)
        self._arena[EXPERTS] = ActivityState(counts)
        for stage in self._stages:
            stage[EXPERTS] = ActivityState(torch.zeros_like(counts[0]))

    @property
    def arena(self) -> dict[int, BankState]:
        """All rows of each layer: every tensor has a leading dimension of ``num_rows`` + 1."""
        return self._arena

    @property
    def scratch_row(self) -> int:
        """The row that nobody owns: what a step does in vain goes there."""
        return self.num_rows

    @property
    def num_free(self) -> int:
        """Rows that nobody holds."""
        return len(self._free)

    def check_out(self, source: int | None = None) -> int:
        """A working row with a stage: a copy of row ``source``, or empty banks."""
        if not self._free or not self._free_stages:
            raise EngineError("no free bank row; raise pa_memory or lower max_num_seqs")
        row, stage = self._free.pop(), self._free_stages.pop()
        self.prepare(row, stage, source)
        return row

    def prepare(self, row: int, stage: int | None, source: int | None) -> None:
        """Overwrite a row with empty banks or those of row ``source``; with a stage it is a working row."""
        if stage is not None:
            self._stage_of[row] = stage
        for layer, bank in self._views[row].items():
            if stage is not None:
                self._stages[stage][layer].clear()
                if stage in self._paper_stages:
                    self._paper_stages[stage][layer].clear()
            if source is None:
                bank.clear()
            else:
                bank.copy_(self._views[source][layer])

    def take(self, source: int | None = None) -> int:
        """A row without a stage, for a session at rest: a copy of row ``source``, or empty banks.

        Raises:
            EngineError: there is none.
        """
        if not self._free:
            raise EngineError("no free bank row; raise pa_memory or lower max_num_seqs")
        row = self._free.pop()
        self.prepare(row, None, source)
        return row

    def settle(self, row: int) -> None:
        """The row's work is done and becomes a session's: its stage is given back."""
        self._free_stages.append(self._stage_of.pop(row))

    def release(self, row: int) -> None:
        """Give a row back, with its stage if it still has one."""
        if row in self._stage_of:
            self.settle(row)
        self._free.append(row)

    def banks(self, row: int) -> dict[int, BankState]:
        """The row's bank of each patched layer, and its activity; changing the tensors changes the row."""
        return self._views[row]

    def copy_out(self, row: int) -> dict[int, BankState]:
        """Copies of a row's banks in host memory."""
        return copy_banks(self._views[row])

    def stages(self, row: int, preset: Preset = "observe") -> dict[int, Stage]:
        """The stages of a working row. Those of ``paper`` have sums M times as large, which are made when a row first
        asks for them, and kept."""
        stage = self._stage_of[row]
        if preset != "paper":
            return self._stages[stage]
        found = self._paper_stages.get(stage)
        if found is None:
            found = self._paper_stages[stage] = self._with_paper_sums(self._stages[stage])
        return found

    def _with_paper_sums(self, stages: dict[int, Any]) -> dict[int, Any]:
        """The same stages but for the sums."""
        config, made = self.config.of("paper"), dict(stages)
        for shape in self.shapes:
            mine = stages[shape.layer]
            other = new_stage(config, shape.inner, shape.hidden, mine.low_keys.dtype, mine.low_keys.device)
            made[shape.layer] = mine._replace(counts=other.counts, sum_keys=other.sum_keys, sum_values=other.sum_values)
        return made

    def counters(self, row: int) -> dict[int, list[int]]:
        """Lifetime counters of a row by layer, in the order of ``COUNTERS``. Waits for the device."""
        return {layer: bank.counters.tolist() for layer, bank in self._patched(row).items()}

    def activity(self, row: int) -> Tensor | None:
        """A copy of a row's expert activity, [L, E] int64; None without a layout."""
        return None if self.experts is None else self._views[row][EXPERTS].activity.clone()

    def _patched(self, row: int) -> dict[int, BankState]:
        return {shape.layer: self._views[row][shape.layer] for shape in self.shapes}

    def filled(self, row: int) -> dict[int, int]:
        """Slots in use by layer. Waits for the device."""
        return {layer: int(bank.filled) for layer, bank in self._patched(row).items()}

    def effective_ranks(self, row: int) -> dict[int, float]:
        """Effective rank of the filled keys by layer. Waits for the device."""
        return {layer: effective_rank(bank.keys[: int(bank.filled)]) for layer, bank in self._patched(row).items()}

    def slot_ages(self, row: int) -> dict[int, float]:
        """Mean number of writes since a filled slot was last changed, by layer. Waits for the device."""
        ages = {}
        for layer, bank in self._patched(row).items():
            filled = int(bank.filled)
            ages[layer] = float((bank.clock - bank.stamp[:filled]).double().mean()) if filled else 0.0
        return ages

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row of banks takes."""
        return sum(tensor[0].nbytes for arena in self._arena.values() for tensor in arena)


def bytes_per_row(
    config: PAConfig, shapes: list[BankShape], dtype: torch.dtype, experts: tuple[int, int] | None = None
) -> int:
    """Bytes of one row, before there is a pool."""
    numbers = sum(config.bank_size * (shape.inner + shape.hidden) for shape in shapes) * dtype.itemsize
    counts = 0 if experts is None else 8 * experts[0] * experts[1]
    return numbers + counts + len(shapes) * 8 * (2 * config.bank_size + 2 + len(COUNTERS))


def _new_arena(config: PAConfig, shape: BankShape, rows: int, dtype: torch.dtype, device: torch.device) -> BankState:
    slots = config.bank_size

    def integers(*size: int) -> Tensor:
        return torch.zeros(rows, *size, dtype=torch.int64, device=device)

    return BankState(
        keys=torch.zeros(rows, slots, shape.inner, dtype=dtype, device=device),
        values=torch.zeros(rows, slots, shape.hidden, dtype=dtype, device=device),
        usage=integers(slots),
        stamp=integers(slots),
        filled=integers(),
        clock=integers(),
        counters=integers(len(COUNTERS)),
    )
