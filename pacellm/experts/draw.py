"""Pictures of layouts and of experts at work. Needs matplotlib (the extra ``cluster``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacellm.errors import ConfigError
from pacellm.experts.layout import Layout


def draw_layout(layout: Layout, path: Path) -> None:
    """How heat is spread over each layer's experts, and how tight they are."""
    plt = _pyplot()
    layers = list(layout.layers)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.42 * len(layers)), width_ratios=[3, 1], layout="constrained", sharey=True
    )
    heat = torch.stack([one.heat.sort(descending=True).values for one in layout.layers.values()])
    image = left.imshow((heat * layout.num_experts).numpy(), aspect="auto", cmap="magma", interpolation="nearest")
    figure.colorbar(image, ax=left, label="heat, mean 1")
    left.set(xlabel="experts, hottest first", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
    right.barh(range(len(layers)), [one.objective for one in layout.layers.values()], color="#555")
    right.set(xlabel="objective (1: no structure)", xlim=(0, 1.02))
    figure.suptitle(
        f"{layout.num_experts} experts of {layout.layers[layers[0]].num_neurons // layout.num_experts} neurons, "
        f"{layout.method} on {layout.features}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_activity(shares: dict[int, Tensor], tokens: int, path: Path, title: str) -> None:
    """Which experts fire over a text's positions.

    Args:
        shares: by layer [bins, E], each expert's share of squared activations.
        tokens: of the text.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(
        len(shares), 1, figsize=(11, 0.8 + 1.55 * len(shares)), sharex=True, squeeze=False, layout="constrained"
    )
    image = None
    for panel, (layer, found) in zip(panels[:, 0], shares.items(), strict=True):
        experts = found.shape[1]
        order = torch.argsort(found.mean(0), descending=True, stable=True)
        relative = (found[:, order].T * experts).clamp(min=1e-3).log2()
        image = panel.imshow(
            relative.numpy(), aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest",
            extent=(0, tokens, experts, 0),
        )  # fmt: skip
        panel.set(ylabel=f"layer {layer}", yticks=[0, experts])
    panels[-1, 0].set(xlabel="position in tokens")
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="log2 of an expert's share × experts", shrink=0.8)
    figure.suptitle(f"{title}: experts by activity, the busiest of each layer on top")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install 'pacellm[cluster]'") from None
    return pyplot
