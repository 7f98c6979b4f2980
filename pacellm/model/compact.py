"""Gate and up of one working set's neurons, side by side in memory, for steps in which all rows have that set.

A neuron's gate and up have the same bits whatever other neurons stand beside it, so they can be left out; a product
with the down-projection has others when terms are left out of its sums (docs/lab.md), so that one stays whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pacellm.model.loops import LANES
from pacellm.model.products import packed_product

USES = 8
"""Steps with the same set after which its weights are copied: that costs as much as a few steps."""
_TRIED = 64  # rows that are compared with those of the whole FFN

Product = Callable[[Tensor], Tensor]


class CompactSet:
    """The set of the sequence that a layer decodes alone.

    Args:
        activation: of the FFN.
    """

    def __init__(self, activation: Product) -> None:
        self._activation = activation
        self._name, self._uses, self._is_exact = b"", 0, True
        self._products: tuple[Product, Product] | None = None
        self._chosen = torch.empty(0, dtype=torch.int64)

    def wants(self, hidden: Tensor, chosen: Tensor, inner_size: int) -> bool:
        """Whether rows [T, H] of a step with this set [E] bool may be worked on here; counts the step."""
        name = chosen.numpy().tobytes()
        if name != self._name:
            self._name, self._uses, self._products = name, 0, None
        self._uses += 1
        kept = int(chosen.sum()) * (inner_size // len(chosen))
        return self._is_exact and self._uses > USES and len(hidden) * kept % LANES == 0

    def inner(self, hidden: Tensor, chosen: Tensor, gate: Part, up: Part, whole: Product) -> Tensor:
        """Inner activations [T, F], zero outside of the set.

        Args:
            hidden: [T, H], with the set that :meth:`wants` was asked about.
            gate, up: weights [F, H] and biases [F]. whole: all inner activations, for where these have other bits.
        """
        experts, size = len(chosen), len(gate[0]) // len(chosen)
        if self._products is None:
            self._chosen = chosen.nonzero()[:, 0]
            self._products = _packed(gate, self._chosen, size), _packed(up, self._chosen, size)
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(_TRIED, hidden.shape[1], generator=generator).to(hidden.dtype)
            expected = whole(sample).view(_TRIED, experts, size)[:, self._chosen].flatten(1)
            self._is_exact = all(
                torch.equal(self._part(sample[:rows]), expected[:rows]) for rows in (_TRIED, len(hidden))
            )
        if not self._is_exact:
            self._products = None
            return whole(hidden).view(-1, experts, size).masked_fill(~chosen[:, None], 0.0).flatten(1)
        found = hidden.new_zeros(len(hidden), experts, size)
        found[:, self._chosen] = self._part(hidden).view(len(hidden), -1, size)
        return found.flatten(1)

    def _part(self, hidden: Tensor) -> Tensor:
        assert self._products is not None
        gate, up = self._products
        return self._activation(gate(hidden)) * up(hidden)


Part = tuple[Tensor, Tensor | None]


def _packed(part: Part, chosen: Tensor, size: int) -> Product:
    weight, bias = (None if one is None else one.unflatten(0, (-1, size))[chosen].flatten(0, 1) for one in part)
    assert weight is not None
    return packed_product(weight, bias)
