"""Panels as matplotlib shows what a Prometheus answered to their queries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from deploy.grafana.live import ask
from deploy.grafana.panels import Panel

Series = list[tuple[str, list[float], list[float]]]
"""Of each line: what it is called, minutes, values; NaN where there were none."""
_STEP = 2
_INTERVAL = "20s"
_UNITS = {"percentunit": (100.0, "%"), "bytes": (2.0**-20, "MiB"), "cps": (1.0, "per second"),
          "reqps": (1.0, "per second"), "s": (1.0, "seconds"), "short": (1.0, "")}  # fmt: skip


def asked(client: httpx.Client, panel: Panel, start: float, end: float) -> Iterator[tuple[Panel, Series]]:
    """A panel and what its queries give between two times, once for each value of the variable that it repeats for."""
    if panel.repeat is None:
        yield panel, _series(client, panel, start, end, {})
        return
    found = client.get(f"/api/v1/label/{panel.repeat}/values", params={"match[]": "pacellm_bank_reads_total"}).json()
    for value in sorted(found["data"], key=int):
        name = f"${panel.repeat}"
        title = panel.title.replace(name, value)
        shown = Panel(title, panel.unit, panel.queries, panel.note, panel.kind)
        yield shown, _series(client, shown, start, end, {name: value})


def _series(client: httpx.Client, panel: Panel, start: float, end: float, variables: dict[str, str]) -> Series:
    found: Series = []
    for query, legend in panel.queries:
        for one in ask(client, "query_range", query, _INTERVAL, variables, start=start, end=end, step=_STEP):
            name = re.sub(r"\{\{(\w+)\}\}", lambda match, one=one: one["metric"].get(match[1], ""), legend)
            values = {round((when - start) / _STEP): float(value) for when, value in one["values"]}
            steps = range(math.ceil((end - start) / _STEP))
            found.append((name, [step * _STEP / 60 for step in steps], [values.get(s, math.nan) for s in steps]))
    return sorted(found, key=lambda series: [int(number) for number in re.findall(r"\d+", series[0])])


def draw(title: str, panels: list[tuple[Panel, Series]], path: Path) -> None:
    """One dashboard: six numbers or three graphs in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[list[tuple[Panel, Series]]] = []
    for one in panels:
        kind = one[0].kind == "stat"
        last = rows[-1] if rows else []
        if not last or (last[0][0].kind == "stat") != kind or len(last) == (6 if kind else 3):
            rows.append([])
        rows[-1].append(one)
    heights = [1.0 if row[0][0].kind == "stat" else 3.1 for row in rows]
    figure = pyplot.figure(figsize=(15, sum(heights) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(rows), 6, height_ratios=heights)
    for number, row in enumerate(rows):
        width = 1 if row[0][0].kind == "stat" else 2
        for place, (panel, found) in enumerate(row):
            _draw(figure.add_subplot(grid[number, width * place : width * (place + 1)]), panel, found)
    figure.suptitle(f"PaceLLM: {title}", fontsize=13, x=0.01, ha="left")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw(axis: Any, panel: Panel, found: Series) -> None:
    axis.set_title(panel.title, fontsize=10, loc="left")
    if panel.kind == "stat":
        _stat(axis, panel, found)
        return
    if panel.kind == "heatmap":
        _heatmap(axis, found)
    else:
        _graph(axis, panel, found)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("minutes", fontsize=7)


def _graph(axis: Any, panel: Panel, found: Series) -> None:
    scale, unit = _UNITS[panel.unit]
    if panel.kind == "stacked":
        parts = [[0.0 if math.isnan(value) else scale * value for value in values] for _, _, values in found]
        axis.stackplot(found[0][1], parts, labels=[name for name, _, _ in found], alpha=0.7)
        axis.set_ylim(0, scale)
    else:
        for name, minutes, values in found:
            axis.plot(minutes, [scale * value for value in values], label=name, linewidth=1.4)
        axis.set_ylim(bottom=0)
    axis.set_ylabel(unit, fontsize=8)
    axis.grid(alpha=0.3)
    if len(found) > 1 or found[0][0]:
        axis.legend(fontsize=7, loc="best", ncols=2 if len(found) > 4 else 1, framealpha=0.6)


def _heatmap(axis: Any, found: Series) -> None:
    """Buckets are told with all that lie below them; drawn is what each has for itself."""
    own, below = [], [0.0] * len(found[0][1])
    for _, _, values in sorted(found, key=lambda series: float(series[0])):
        reached = [0.0 if math.isnan(value) else value for value in values]
        own.append([max(0.0, here - there) for here, there in zip(reached, below, strict=True)])
        below = reached
    names = sorted((name for name, _, _ in found), key=float)
    axis.pcolormesh(found[0][1], range(len(own)), own, cmap="Blues", shading="nearest")
    axis.set_yticks(range(len(own)), names)
    axis.set_ylabel("at most", fontsize=8)


def _stat(axis: Any, panel: Panel, found: Series) -> None:
    scale, unit = _UNITS[panel.unit]
    axis.set_axis_off()
    told = []
    for name, _, values in found:
        there = [value for value in values if not math.isnan(value)]
        number = f"{scale * there[-1]:.3g}" if there else "no data"
        told.append(f"{number} {unit}".strip() + (f"  {name}" if len(found) > 1 else ""))
    axis.text(0.0, 0.45, "\n".join(told), fontsize=18 if len(told) == 1 else 12, va="center", color="tab:blue")
