"""Which kernel a CPU's linear layers use, and with how many rows a row of a product has the same bits in any company.

torch's own kernel wants up to 16 rows for that (docs/lab.md), so a step of one token did the arithmetic of 16. oneDNN's
wants fewer, and over weights in its own order four rows take hardly longer than one. Nothing is taken on trust: each
size of product is measured on this machine. What decides is exactness alone, so every start decides alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pacellm.model.loops import LANES
from pacellm.rows import ROWS

_MANY = 512
_FEW = (4, 8, ROWS)
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KEPT = 256
"""Compiled products, one for each size and number of rows. By default oneDNN and torch's layer over it keep 1,024 each,
560 KiB for a pair: more than 400 MiB for a server whose steps have had all numbers of rows. Compiling one anew takes
half a millisecond."""

Size = tuple[int, int]
Kind = tuple[Size, bool, type]
"""Size, whether there is a bias, and class of a layer."""


@dataclass(frozen=True)
class Products:
    """How the products of a model on this machine are computed.

    Attributes:
        kernel: ``onednn`` where any layer uses it, else ``torch``.
        rows: steps have a multiple of this many; 1 where bits were given up for speed.
        inexact: sizes (in, out) whose rows have other bits among many rows than among few, whatever is done.
        packed: bytes of weights that are there a second time, in the kernel's own order.
        is_exact: answers do not depend on batch mates and chunk sizes.
    """

    kernel: str = "torch"
    rows: int = ROWS
    inexact: tuple[Size, ...] = ()
    packed: int = 0
    is_exact: bool = True


_chosen: WeakKeyDictionary[nn.Module, tuple[int, Products]] = WeakKeyDictionary()


def choose(module: nn.Module, memory: int) -> Products:
    """Find the fewest rows with which every linear layer is exact by one of the kernels, and let it use that one.

    Measured once for a model and a number of threads, and on a CPU only: CUDA promises no bits.

    Args:
        memory: bytes that packed weights may take. Packed or not, a product has the same bits.
    """
    kept = _chosen.get(module)
    if kept is not None and kept[0] == torch.get_num_threads():
        return kept[1]
    _keep_few()
    give_back(module)
    kinds = _kinds(module)
    packs = sum(layer.weight.nbytes for layers in kinds.values() for layer in layers) <= memory
    trials = {kind: _Trial(layers[0], packs) for kind, layers in kinds.items()}
    rows = _fewest_rows(module, list(trials.values()))
    kernel, packed, inexact = "torch", 0, set()
    for kind, trial in trials.items():
        match trial.kernel(rows):
            case None:
                inexact.add(kind[0])
            case "onednn":
                kernel, packed = "onednn", packed + _use_onednn(kinds[kind], trial.packs)
    products = Products(kernel, rows, tuple(sorted(inexact)), packed, not inexact)
    _chosen[module] = torch.get_num_threads(), products
    return products


def _keep_few() -> None:
    """Bound the compiled products that are kept, unless the environment says how many: it is read at a process's first
    product."""
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(_KEPT))


def _fewest_rows(module: nn.Module, trials: list[_Trial]) -> int:
    """With which every layer is exact by one of the kernels."""
    return next((rows for rows in _FEW if _fits(module, rows) and all(one.kernel(rows) for one in trials)), ROWS)


def _kinds(module: nn.Module) -> dict[Kind, list[nn.Linear]]:
    """Layers whose products are computed alike."""
    kinds: dict[Kind, list[nn.Linear]] = {}
    for layer in _linears(module):
        kind = (layer.in_features, layer.out_features), layer.bias is not None, type(layer)
        kinds.setdefault(kind, []).append(layer)
    return kinds


def _use_onednn(layers: list[nn.Linear], packs: bool) -> int:
    """Bytes of the weights that are there a second time."""
    for layer in layers:
        layer.forward = OneDNN(layer, packs=packs)  # type: ignore[method-assign,assignment]
    return sum(layer.weight.nbytes for layer in layers) if packs else 0


def give_back(module: nn.Module) -> None:
    """The layers' own forwards again."""
    _chosen.pop(module, None)
    for layer in _linears(module):
        if isinstance(layer.__dict__.get("forward"), OneDNN):
            del layer.forward


class OneDNN:
    """A linear layer's forward by oneDNN.

    Args:
        packs: keep the weights in the kernel's own order too.
    """

    def __init__(self, layer: nn.Linear, *, packs: bool) -> None:
        self._layer, self.packs = layer, packs
        self._packed: Tensor | None = None
        self._source: tuple[int, int] | None = None  # where the packed weights came from
        if packs:
            self._weight()

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not hidden.numel():
            return nn.functional.linear(hidden, self._layer.weight, self._layer.bias)
        return _product()(hidden, self._weight(), self._layer.bias, "none", [], "")

    def _weight(self) -> Tensor:
        weight = self._layer.weight
        if not self.packs:
            return weight
        source = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self._packed is None or source != self._source:  # neurons may have been put into another order since
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _FEW[0])
            self._source = source
        return self._packed


def _product() -> Callable[..., Tensor]:
    return torch.ops.mkldnn._linear_pointwise.default


class _Trial:
    """One layer of each kind, tried out.

    Attributes:
        forms: the kernels that take it, oneDNN first.
        packs: oneDNN may pack its weights: there is memory, and it changes no bit.
    """

    def __init__(self, layer: nn.Linear, packs: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.randn(_MANY, layer.in_features, generator=generator).to(layer.weight.dtype)
        self._many: dict[str, Tensor] = {}
        self.forms: dict[str, Callable[[Tensor], Tensor]] = {"torch": layer}
        self.packs = packs
        if type(layer) is nn.Linear and "forward" not in layer.__dict__:
            self._try_onednn(layer)

    @torch.inference_mode()
    def _try_onednn(self, layer: nn.Linear) -> None:
        few, plain = self._hidden[:ROWS], OneDNN(layer, packs=False)
        try:
            found = plain(few)
            packed = OneDNN(layer, packs=True) if self.packs else plain
            self.packs = self.packs and torch.equal(packed(few), found)
        except (RuntimeError, AttributeError):  # torch without it, or weights of a type that it does not take here
            return
        self.forms = {"onednn": packed if self.packs else plain, **self.forms}

    @torch.inference_mode()
    def kernel(self, rows: int) -> str | None:
        """The one by which multiples of ``rows`` rows are exact; None where none is."""
        return next((name for name in self.forms if self._is_exact(name, rows)), None)

    def _is_exact(self, name: str, rows: int) -> bool:
        if name not in self._many:
            self._many[name] = self._product(name, _MANY)
        counts = (rows, 2 * rows, 3 * rows, 5 * rows, 96 + rows)
        return all(torch.equal(self._product(name, count), self._many[name][:count]) for count in counts)

    def _product(self, name: str, count: int) -> Tensor:
        found: Any = self.forms[name](self._hidden[:count])
        return found if isinstance(found, Tensor) else found[0]  # routers give more


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu"]


def _fits(module: nn.Module, rows: int) -> bool:
    """Multiples of ``rows`` rows suit what is not a linear layer: other products want ``ROWS``, and loops over all
    of a step's numbers must have no remainder (``loops.py``)."""
    if rows == ROWS:
        return True
    return all(_suits(owner, rows) for owner in module.modules())


def _suits(owner: nn.Module, rows: int) -> bool:
    if type(owner) is nn.Linear:
        return rows * owner.in_features % LANES == 0
    tensors = [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]
    return isinstance(owner, nn.Embedding) or all(tensor.ndim <= 1 for tensor in tensors)
