"""``pacellm cluster`` and ``pacellm experts``: layouts of Cortical Experts, made and looked at."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pacellm.errors import ConfigError

if TYPE_CHECKING:
    from pacellm.experts.layout import LayerLayout


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm cluster``."""
    add = parser.add_argument
    add("model", nargs="?", help="as for serve (default: the bundled model)")
    add("-o", "--output", type=Path, help="the layout file; with --inspect its picture (PNG)")
    add("--experts", type=int, default=64, help="experts of each layer; must divide its neurons")
    add("--features", default="weights", choices=("weights", "activations"), help="what neurons are clustered by: rows "
        "of the gate projection, or what they do on a text")  # fmt: skip
    add("--calibration", type=Path, help="the text for activations, UTF-8")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count() or 1, help="layers clustered at a time")
    add("--inspect", type=Path, metavar="FILE", help="print and draw a layout instead of making one")
    parser.set_defaults(run=cluster)


def add_experts(parser: argparse.ArgumentParser) -> None:
    """The flags of ``pacellm experts``."""
    add = parser.add_argument
    add("document", type=Path, help="a text, UTF-8")
    add("model", nargs="?", help="as for serve (default: the bundled model)")
    add("--ce-layout", type=Path, required=True, help="the model's layout")
    add("-o", "--output", type=Path, default=Path("experts.png"), help="the picture (PNG)")
    parser.set_defaults(run=experts)


def cluster(options: argparse.Namespace) -> int:
    """Make a layout, or show one."""
    if options.inspect is not None:
        return _inspect(options.inspect, options.output)
    from pacellm.experts.apply import model_fingerprint, weight_features
    from pacellm.experts.cluster import cluster_layers
    from pacellm.experts.layout import Layout

    if options.output is None:
        raise ConfigError("say where the layout goes: -o FILE", param="output")
    if (options.features == "activations") != (options.calibration is not None):
        raise ConfigError("--features activations and --calibration FILE go together", param="calibration")
    if options.workers < 1:
        raise ConfigError(f"workers must be at least 1, not {options.workers}", param="workers")
    model, name = _load(options.model)
    about = {"model": name, "library": "k-means-constrained"}
    if options.features == "activations":
        from pacellm.experts.activity import activation_features

        ids = _ids(options.model, options.calibration, model.context_length)
        features = activation_features(model, ids, seed=options.seed)
        about["calibration"] = f"{len(ids)} tokens of {options.calibration.name}"
    else:
        features = weight_features(model.module)
    started = time.monotonic()

    def tell(layer: int, found: LayerLayout, is_new: bool) -> None:
        kept = "" if is_new else " (kept)"
        seconds = time.monotonic() - started
        print(f"layer {layer}: objective {found.objective:.4f}{kept}, {seconds:.1f} s", file=sys.stderr, flush=True)

    parts = options.output.with_name(options.output.name + ".parts")
    layers = cluster_layers(
        features, options.experts, options.seed, parts, workers=options.workers, on_layer=tell
    )  # fmt: skip
    layout = Layout(layers, "kmeans", options.features, options.seed, model_fingerprint(model.module), about)
    layout.save(options.output)
    shutil.rmtree(parts)
    print(f"{options.output}: {len(layers)} layers, {layout.num_experts} experts each; digest {layout.digest[:12]}")
    return 0


def experts(options: argparse.Namespace) -> int:
    """Draw which experts fire over a document."""
    from pacellm.experts.activity import expert_shares
    from pacellm.experts.apply import apply_layout
    from pacellm.experts.draw import draw_activity
    from pacellm.experts.layout import Layout

    layout = Layout.load(options.ce_layout)
    model, _ = _load(options.model)
    ids = _ids(options.model, options.document, model.context_length)
    shares = expert_shares(apply_layout(model, layout), ids)
    draw_activity(shares, len(ids), options.output, options.document.name)
    print(f"{options.output}: {len(ids):,} tokens, {len(shares)} layers")
    return 0


def _inspect(path: Path, picture: Path | None) -> int:
    from pacellm.experts.draw import draw_layout
    from pacellm.experts.layout import Layout

    layout = Layout.load(path)
    print(f"{layout.method} on {layout.features}, seed {layout.seed}, {layout.num_experts} experts a layer")
    print(f"model fingerprint {layout.fingerprint[:12]}, digest {layout.digest[:12]}")
    for name, value in layout.about.items():
        print(f"{name}: {value}")
    print(f"{'layer':>5} {'neurons':>8} {'objective':>10}   heat of the hottest eighth and half")
    for layer, one in layout.layers.items():
        heat = one.heat.sort(descending=True).values
        eighth, half = (float(heat[: max(1, len(heat) // part)].sum()) for part in (8, 2))
        print(f"{layer:>5} {one.num_neurons:>8,} {one.objective:>10.4f}   {eighth:.3f} {half:.3f}")
    picture = picture or path.with_suffix(".png")
    draw_layout(layout, picture)
    print(f"drawn: {picture}")
    return 0


def _load(name: str | None):
    import torch

    from pacellm.demo import MODEL_PATH
    from pacellm.model.load import load
    from pacellm.real_models import resolve

    torch.set_grad_enabled(False)
    return load(resolve(name) if name else MODEL_PATH), name or "pacellm-demo"


def _ids(name: str | None, path: Path, limit: int) -> list[int]:
    """A text's tokens, cut to the model's context."""
    from pacellm.demo import MODEL_PATH
    from pacellm.real_models import resolve
    from pacellm.text.tokenizer import ChatTokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from None
    ids = ChatTokenizer(resolve(name) if name else MODEL_PATH).backend.encode(text).ids[: limit - 1]
    if not ids:
        raise ConfigError(f"{path} has no text")
    return ids
