"""What a prefill kernel on CUDA is told of a call, and what a step knows of its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PlanPart:
    """``count`` queries from row ``first`` of a plan's queries, and their ``length`` keys from slot ``slot``."""

    first: int
    count: int
    slot: int
    length: int


@dataclass(frozen=True)
class AttentionPlan:
    """Where one call reads: the packed rows of its sequences [n], a slice where they are neighbours, and where each
    one's keys lie. Told twice, as tensors on the device and as numbers. With ``copies`` the parts are of one chunk,
    whose queries are asked so many times, each time of other keys."""

    rows: Tensor | slice
    cu_queries: Tensor
    starts: Tensor
    lengths: Tensor
    max_queries: int
    max_keys: int
    causal: bool
    parts: tuple[PlanPart, ...]
    copies: int = 1

    @property
    def target(self) -> Tensor | slice:
        """The rows that the answers are of: each once."""
        return self.rows if isinstance(self.rows, slice) else self.rows[: len(self.rows) // self.copies]


Call = Callable[[Tensor, Tensor, Tensor, AttentionPlan, float, int | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PrefillKernel:
    """A way to compute attention of a plan.

    Attributes:
        name: as ``--attention-kernel`` has it.
        call: (queries [n, H, D] of the plan's rows, keys, values [slots, Hkv, D], plan, scale, window).
        least: queries of a part below which ``flash`` is used instead.
        windows: it computes sliding windows.
    """

    name: str
    call: Call
    least: int = 1
    windows: bool = True

    def takes(self, plan: AttentionPlan, window: int | None) -> bool:
        """It computes this; where not, flash does."""
        return (window is None or self.windows) and min(part.count for part in plan.parts) >= self.least
