"""A calibration's picture. Needs matplotlib (the extra ``cluster``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pacellm.calibration.file import ACTING, Calibration, Effect
from pacellm.calibration.gate import LIMIT
from pacellm.errors import ConfigError


def check_drawing() -> None:
    """Refuse before anything is measured.

    Raises:
        ConfigError: matplotlib is not there.
    """
    _pyplot()


def draw(found: Calibration, path: Path) -> None:
    """Every layer's ratio under each acting preset, with intervals, and what was measured together."""
    plt = _pyplot()
    figure, panel = plt.subplots(figsize=(11, 4.5), layout="constrained")
    if found.banks is not None:
        for preset, colour, shift in zip(ACTING, ("#2b6cb0", "#c05621"), (-0.12, 0.13), strict=True):
            layers = found.banks.alone(preset)
            for form, marker in (("prompt", "o"), ("decoded", "s")):
                known = {int(layer) + shift: getattr(one, form) for layer, one in layers.items()}
                style = {"fmt": marker, "color": colour, "fillstyle": "full" if form == "prompt" else "none"}
                _draw_effects(panel, known, label=f"{preset}, {form}", **style)
        panel.legend(ncols=2, loc="upper left")
    panel.axhline(1.0, color="#999", linewidth=1)
    panel.axhline(LIMIT, color="#999", linewidth=1, linestyle="--")
    panel.set(yscale="log", xlabel="layer with a bank", ylabel="perplexity, plain model's = 1")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    figure.suptitle(f"{found.model.name}: one layer's bank at a time, {found.text.part:,} tokens")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_effects(panel: Any, effects: Mapping[float, Effect | None], **style: Any) -> None:
    """Ratios with their intervals by place, where there are any."""
    points = {place: effect for place, effect in effects.items() if effect is not None}
    ratios = [effect.ratio for effect in points.values()]
    below, above = [one.ratio - one.low for one in points.values()], [one.high - one.ratio for one in points.values()]
    panel.errorbar(list(points), ratios, [below, above], markersize=4, linewidth=1, **style)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'pacellm[cluster]'", param="plot") from None
    return pyplot
