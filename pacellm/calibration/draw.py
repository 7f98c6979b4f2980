"""A calibration's picture. Needs matplotlib (the extra ``cluster``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pacellm.calibration.file import ACTING, Calibration
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
        for number, (preset, colour) in enumerate(zip(ACTING, ("#2b6cb0", "#c05621"), strict=True)):
            layers = found.banks.alone(preset)
            for form, marker in (("prompt", "o"), ("decoded", "s")):
                known = [(int(layer), getattr(one, form)) for layer, one in layers.items()]
                points = [(layer, effect) for layer, effect in known if effect is not None]
                panel.errorbar(
                    [layer + 0.25 * number - 0.12 for layer, _ in points],
                    [effect.ratio for _, effect in points],
                    [
                        [effect.ratio - effect.low for _, effect in points],
                        [effect.high - effect.ratio for _, effect in points],
                    ],
                    fmt=marker,
                    color=colour,
                    fillstyle="full" if form == "prompt" else "none",
                    markersize=4,
                    linewidth=1,
                    label=f"{preset}, {form}",
                )
        panel.legend(ncols=2, loc="upper left")
    panel.axhline(1.0, color="#999", linewidth=1)
    panel.axhline(LIMIT, color="#999", linewidth=1, linestyle="--")
    panel.set(yscale="log", xlabel="layer with a bank", ylabel="perplexity, plain model's = 1")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    figure.suptitle(f"{found.model.name}: one layer's bank at a time, {found.text.part:,} tokens")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'pacellm[cluster]'", param="plot") from None
    return pyplot
