"""One bank as an object, for tests and tools; the engine works on rows of an arena (``pool.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.segment import count, read, settle, stage, write
from pacellm.memory.state import EMPTY, FUSES, HITS, MISSES, new_bank, new_stage


class Bank:
    """One bank.

    Example::

        bank = Bank(PAConfig(bank_size=8), inner_size=64, hidden_size=16)
        output = bank.step(x, y)
    """

    def __init__(
        self,
        config: PAConfig | None = None,
        *,
        inner_size: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config or PAConfig()
        self.state = new_bank(self.config, inner_size, hidden_size, dtype, torch.device(device))
        self._stage = new_stage(self.config, inner_size, hidden_size, dtype, torch.device(device))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Read, then write, one segment.

        Args:
            x: [n, F] inner activations. y: [n, H] bias-free FFN outputs.

        Returns:
            [n, H], the outputs before the bias; under ``observe`` y itself.

        Raises:
            ValueError: shapes that do not belong to this bank.
        """
        inner, hidden = self.state.keys.shape[1], self.state.values.shape[1]
        if x.ndim != 2 or y.ndim != 2 or x.shape != (y.shape[0], inner) or y.shape[1] != hidden:
            raise ValueError(f"expected x [n, {inner}] and y [n, {hidden}], got {list(x.shape)} and {list(y.shape)}")
        if not x.shape[0]:
            return y
        result = read(self.state, x, y, self.config)
        stage(self._stage, result, x, self.config)
        write(self.state, self._stage, self.config)
        return result.output if self.config.acts else y

    def recall(self, x: Tensor, y: Tensor) -> Tensor:
        """Read one segment and count its outcomes, without writing; arguments and result as of :meth:`step`, whose
        outputs are those of a preset that acts."""
        result = read(self.state, x, y, self.config)
        count(self._stage, result)
        settle(self.state, self._stage)
        return result.output

    @property
    def keys(self) -> Tensor:
        """[M, F]"""
        return self.state.keys

    @property
    def values(self) -> Tensor:
        """[M, H]"""
        return self.state.values

    @property
    def usage(self) -> Tensor:
        """[M] int64"""
        return self.state.usage

    @property
    def filled(self) -> int:
        """Slots in use."""
        return int(self.state.filled)

    @property
    def hits(self) -> int:
        """Tokens read with a similarity above ``theta_high``."""
        return int(self.state.counters[HITS])

    @property
    def fuses(self) -> int:
        """Tokens read between the thresholds."""
        return int(self.state.counters[FUSES])

    @property
    def misses(self) -> int:
        """Tokens read at or below ``theta_low``."""
        return int(self.state.counters[MISSES])

    @property
    def empty(self) -> int:
        """Tokens that met an empty bank."""
        return int(self.state.counters[EMPTY])
