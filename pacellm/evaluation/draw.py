"""An evaluation's picture. Needs matplotlib (the extra ``eval``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pacellm.errors import ConfigError
from pacellm.evaluation.report import ALL, Row


def check_drawing() -> None:
    """Refuse before anything is asked.

    Raises:
        ConfigError: matplotlib is not there.
    """
    _pyplot()


def draw_grid(records: Sequence[Mapping[str, Any]], arms: Sequence[str], title: str, path: Path) -> None:
    """Scores by length and depth, a panel for each arm; cells without an answer are grey."""
    plt = _pyplot()
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})
    figure, panels = plt.subplots(
        1, len(arms), squeeze=False, sharey=True, layout="constrained",
        figsize=(1.5 + len(arms) * max(2.6, 0.55 * len(lengths)), 1.6 + 0.32 * len(depths)),
    )  # fmt: skip
    for panel, arm in zip(panels[0], arms, strict=True):
        cells = np.full((len(depths), len(lengths)), np.nan)
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                scores = [record["score"] for record in records if "refused" not in record and record["arm"] == arm
                          and (record["length"], record["depth"]) == (length, depth)]  # fmt: skip
                if scores:
                    cells[row, column] = 100 * sum(scores) / len(scores)
        for row, column in np.argwhere(~np.isnan(cells)):
            panel.text(column, row, f"{cells[row, column]:.0f}", ha="center", va="center", fontsize=8)
        image = panel.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        panel.set_facecolor("#ccc")
        panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths], rotation=45)
        panel.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        panel.set(title=arm, xlabel="tokens")
    panels[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels[0].tolist(), label="score")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_bars(found: Sequence[Row], arms: Sequence[str], title: str, path: Path) -> None:
    """Scores by task with 95 % intervals, a bar for each arm."""
    plt = _pyplot()
    places = list(dict.fromkeys((row.task, row.length) for row in found if row.task != ALL))
    figure, panel = plt.subplots(figsize=(2 + len(places) * (0.4 + 0.25 * len(arms)), 4.5), layout="constrained")
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        rows = [row for row in found if row.arm == arm and row.task != ALL and row.score is not None]
        at = [places.index((row.task, row.length)) + (number - (len(arms) - 1) / 2) * width for row in rows]
        means = [row.score for row in rows if row.score is not None]
        values = [100 * mean.value for mean in means]
        errors = [[100 * (mean.value - mean.low) for mean in means], [100 * (mean.high - mean.value) for mean in means]]
        panel.bar(at, values, width, yerr=np.maximum(errors, 0) if means else None, label=arm, capsize=2)
    names = [task if length is None else f"{task}\n{_short(length)}" for task, length in places]
    panel.set_xticks(range(len(places)), names, rotation=45 if len(places) > 4 else 0)
    panel.set(ylabel="score", ylim=(0, 105))
    panel.legend(ncols=len(arms), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'pacellm[eval]'", param="plot") from None
    return pyplot
