"""Balanced k-means over FFN neurons with k-means-constrained, the authors' choice; layers in processes of their own.

A finished layer lies in a folder beside the output, so that a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pacellm.errors import ConfigError
from pacellm.experts.layout import LayerLayout

_MAX_ITERATIONS = 100


@dataclass(frozen=True)
class Features:
    """What one layer's neurons are clustered by.

    Attributes:
        points: [F, D] float32.
        heat: [F] float32, each neuron's activity, in any unit.
    """

    points: Tensor
    heat: Tensor


def check_experts(num_experts: int, neurons: int) -> None:
    """Refuse a number of experts that cannot be of equal size.

    Raises:
        ConfigError: names numbers that can.
    """
    if 1 <= num_experts <= neurons and neurons % num_experts == 0:
        return
    good = [count for count in range(2, min(neurons, 257)) if neurons % count == 0]
    near = sorted(sorted(good, key=lambda count: abs(count - num_experts))[:5])
    raise ConfigError(
        f"experts must divide the {neurons:,} neurons of a layer, {num_experts} does not; take one of "
        f"{', '.join(map(str, near)) or neurons}",
        param="experts",
    )


def cluster(features: Features, num_experts: int, seed: int) -> LayerLayout:
    """One layer's layout by k-means with equal cluster sizes.

    Raises:
        ConfigError: the library is not there, or the sizes do not fit.
    """
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        raise ConfigError("clustering needs k-means-constrained: pip install 'pacellm[cluster]'") from None
    points = features.points.double().numpy()
    check_experts(num_experts, len(points))
    size = len(points) // num_experts
    found = KMeansConstrained(
        num_experts, size_min=size, size_max=size, n_init=1, max_iter=_MAX_ITERATIONS, random_state=seed
    ).fit(points)
    return from_labels(torch.from_numpy(np.asarray(found.labels_, dtype=np.int64)), features, num_experts)


def shuffled(features: Features, num_experts: int, seed: int) -> LayerLayout:
    """A layer in random order: the control that every layout is to be compared with."""
    check_experts(num_experts, len(features.points))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features.points), generator=generator)
    labels = torch.empty_like(order)
    labels[order] = torch.arange(len(order)) // (len(order) // num_experts)
    return from_labels(labels, features, num_experts)


def from_labels(labels: Tensor, features: Features, num_experts: int) -> LayerLayout:
    """The layout that puts neurons of a label together, labels and neurons in ascending order."""
    permutation = torch.argsort(labels, stable=True)
    size = len(labels) // num_experts
    groups = features.points.double()[permutation].view(num_experts, size, -1)
    within = (groups - groups.mean(1, keepdim=True)).square().sum()
    around = (features.points.double() - features.points.double().mean(0)).square().sum()
    heat = features.heat.double()[permutation].view(num_experts, size).sum(1)
    return LayerLayout(
        permutation,
        torch.arange(num_experts + 1) * size,
        (heat / heat.sum().clamp(min=1e-300)).float(),
        float(within / around.clamp(min=1e-300)),
    )


def cluster_layers(
    features: Mapping[int, Features],
    num_experts: int,
    seed: int,
    parts: Path,
    *,
    workers: int,
    on_layer: Callable[[int, LayerLayout, bool], None] = lambda layer, found, is_new: None,
) -> dict[int, LayerLayout]:
    """Every layer's layout, those that are in ``parts`` already not computed again.

    Args:
        features: by layer.
        num_experts: experts of a layer.
        seed: of every layer's clustering.
        parts: folder of finished layers; made where it is missing.
        workers: processes; 1 works in this one.
        on_layer: told of every layer as it comes, and whether it was computed now.
    """
    for one in features.values():
        check_experts(num_experts, len(one.points))
    parts.mkdir(parents=True, exist_ok=True)
    done: dict[int, LayerLayout] = {}
    paths = {layer: parts / f"{layer}-{_key(one, num_experts, seed)}.safetensors" for layer, one in features.items()}
    for layer, path in paths.items():
        if (kept := _read(path)) is not None:
            done[layer] = kept
            on_layer(layer, kept, False)
    left = [layer for layer in features if layer not in done]
    for layer, found in _run({layer: features[layer] for layer in left}, num_experts, seed, workers):
        _write(paths[layer], found)
        done[layer] = found
        on_layer(layer, found, True)
    return dict(sorted(done.items()))


def _run(
    features: Mapping[int, Features], num_experts: int, seed: int, workers: int
) -> Iterator[tuple[int, LayerLayout]]:
    if workers <= 1 or len(features) <= 1:
        for layer, one in features.items():
            yield layer, cluster(one, num_experts, seed)
        return
    with ProcessPoolExecutor(min(workers, len(features)), mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(_job, one.points.numpy(), one.heat.numpy(), num_experts, seed): layer
            for layer, one in features.items()
        }
        try:
            while jobs:
                for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                    labels = torch.from_numpy(job.result())
                    layer = jobs.pop(job)
                    yield layer, from_labels(labels, features[layer], num_experts)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _job(points: np.ndarray, heat: np.ndarray, num_experts: int, seed: int) -> np.ndarray:
    """In a process of its own: the neurons' labels."""
    found = cluster(Features(torch.from_numpy(points), torch.from_numpy(heat)), num_experts, seed)
    labels = torch.empty_like(found.permutation)
    labels[found.permutation] = torch.arange(num_experts).repeat_interleave(len(labels) // num_experts)
    return labels.numpy()


def _key(features: Features, num_experts: int, seed: int) -> str:
    digest = hashlib.sha256(f"{num_experts} {seed} {list(features.points.shape)}".encode())
    digest.update(features.points.contiguous().numpy().tobytes())
    digest.update(features.heat.contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _write(path: Path, found: LayerLayout) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    tensors = {
        "permutation": found.permutation,
        "bounds": found.bounds,
        "heat": found.heat,
        "objective": torch.tensor([found.objective], dtype=torch.float64),
    }
    save_file(tensors, temporary)
    temporary.replace(path)


def _read(path: Path) -> LayerLayout | None:
    try:
        found = load_file(path)
        return LayerLayout(found["permutation"], found["bounds"], found["heat"], float(found["objective"]))
    except (OSError, SafetensorError, KeyError):
        return None  # not there, or cut short: computed again
