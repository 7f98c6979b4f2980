"""The layout file: which order a model's FFN neurons get, and where experts begin. Validated when it is read.

A layout is a permutation of each layer's neurons. Applied to gate, up and down alike it changes outputs by rounding
only (PaceLLM, arXiv 2506.17310, section 3.2.2); what it buys is that an expert's weights lie side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pacellm.errors import ConfigError

FORMAT = "pacellm-layout-1"


@dataclass(frozen=True)
class LayerLayout:
    """One layer's neurons in their new order.

    Attributes:
        permutation: [F] int64, the old number of the neuron at each new place.
        bounds: [E + 1] int64, the new places at which experts begin, and F.
        heat: [E] float32, each expert's share of activity, as far as weights or calibration text tell it.
        objective: squared distances to the experts' centres, as a part of those to one centre; lower is tighter.
    """

    permutation: Tensor
    bounds: Tensor
    heat: Tensor
    objective: float

    @property
    def num_neurons(self) -> int:
        """F."""
        return len(self.permutation)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.bounds) - 1


@dataclass(frozen=True)
class Layout:
    """A model's layout.

    Attributes:
        layers: by decoder layer, counted from 0.
        method: ``kmeans`` or ``random``. features: ``weights``, ``activations`` or ``none``.
        seed: of the clustering.
        fingerprint: of the model, before it was permuted.
        about: what else whoever made it wrote down.
    """

    layers: dict[int, LayerLayout]
    method: str
    features: str
    seed: int
    fingerprint: str
    about: Mapping[str, str]

    @property
    def num_experts(self) -> int:
        """Experts of every layer."""
        return next(iter(self.layers.values())).num_experts

    @property
    def digest(self) -> str:
        """What makes it different from other layouts, as 64 hex digits."""
        return _digest(_tensors(self))

    def save(self, path: str | Path) -> None:
        """Write the file."""
        metadata = {
            **self.about,
            "format": FORMAT,
            "method": self.method,
            "features": self.features,
            "seed": str(self.seed),
            "fingerprint": self.fingerprint,
            "objective": json.dumps({str(layer): one.objective for layer, one in self.layers.items()}),
            "digest": self.digest,
        }
        save_file(_tensors(self), path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Layout:
        """Read and check a file.

        Raises:
            ConfigError: missing, damaged, or no layout; says what is wrong and what to do.
        """
        metadata, tensors = _read(path)
        try:
            objective = {int(layer): float(value) for layer, value in json.loads(metadata.pop("objective")).items()}
            known = {name: metadata.pop(name) for name in ("method", "features", "fingerprint", "digest", "seed")}
            layers = {layer: _take(tensors, layer, value) for layer, value in sorted(objective.items())}
            seed = int(known["seed"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _bad(path, f"is incomplete ({type(error).__name__}: {error})") from None
        if tensors or not layers:
            raise _bad(path, "describes other tensors than it holds")
        if len({one.num_experts for one in layers.values()}) != 1:
            raise _bad(path, "has layers with different numbers of experts")
        layout = cls(layers, known["method"], known["features"], seed, known["fingerprint"], metadata)
        if layout.digest != known["digest"]:
            raise _bad(path, "is damaged: its numbers do not give its digest")
        return layout


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise _bad(path, f"cannot be read ({error})") from None
    if (found := metadata.pop("format", "unnamed")) != FORMAT:
        raise _bad(path, f"has the format {found[:40]!r}, not {FORMAT!r}")
    return metadata, tensors


def _tensors(layout: Layout) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for layer, one in sorted(layout.layers.items()):
        found[f"permutation.{layer}"] = one.permutation.to(torch.int32).contiguous()
        found[f"bounds.{layer}"] = one.bounds.to(torch.int32).contiguous()
        found[f"heat.{layer}"] = one.heat.to(torch.float32).contiguous()
    return found


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        numbers: Any = tensor.numpy()
        digest.update(numbers.tobytes())
    return digest.hexdigest()


def _take(tensors: dict[str, Tensor], layer: int, objective: float) -> LayerLayout:
    """One layer out of ``tensors``, checked.

    Raises:
        KeyError, ValueError: parts missing or impossible.
    """
    permutation, bounds, heat = (tensors.pop(f"{name}.{layer}") for name in ("permutation", "bounds", "heat"))
    if (permutation.ndim, bounds.ndim, heat.ndim) != (1, 1, 1):
        raise ValueError(f"layer {layer} has tensors of another shape")
    if (permutation.dtype, bounds.dtype, heat.dtype) != (torch.int32, torch.int32, torch.float32):
        raise ValueError(f"layer {layer} has numbers of another type")
    neurons = len(permutation)
    if not torch.equal(permutation.sort().values, torch.arange(neurons, dtype=torch.int32)):
        raise ValueError(f"layer {layer} does not name every neuron once")
    if not _are_even(bounds.tolist(), neurons):
        raise ValueError(f"layer {layer} has experts of different sizes")
    if len(heat) != len(bounds) - 1 or not bool(torch.isfinite(heat).all()):
        raise ValueError(f"layer {layer} has no heat for every expert")
    return LayerLayout(permutation.long(), bounds.long(), heat, objective)


def _are_even(bounds: list[int], neurons: int) -> bool:
    """Experts begin at equal steps from 0 to ``neurons``."""
    count = len(bounds) - 1
    is_whole = count > 0 and neurons > 0 and neurons % count == 0
    return is_whole and bounds == list(range(0, neurons + 1, neurons // count))


def _bad(path: str | Path, problem: str) -> ConfigError:
    return ConfigError(
        f"ce_layout {path} {problem}; make it again with `pacellm cluster MODEL -o FILE`", param="ce_layout"
    )
