"""How many rows a matrix product needs on a CPU.

With a multiple of ``ROWS`` rows each row of a product has the same bits whatever rows stand beside it
(docs/lab.md), so everything whose result must not depend on its neighbours is padded to such a number.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

ROWS = 16


def missing_rows(count: int, multiple: int = ROWS) -> int:
    """Rows to add to ``count`` rows."""
    return -count % multiple


def pad_rows(matrix: Tensor, multiple: int = ROWS) -> Tensor:
    """[..., n, D] with zero rows added on a CPU, to a multiple of ``multiple``; elsewhere as it is."""
    missing = missing_rows(matrix.shape[-2], multiple)
    return F.pad(matrix, (0, 0, 0, missing)) if missing and matrix.device.type == "cpu" else matrix
