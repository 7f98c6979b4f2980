"""Panels as the dashboards list them, and Grafana's JSON of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from deploy.grafana.queries import Query

Kind = Literal["lines", "stacked", "stat", "heatmap"]
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24


@dataclass(frozen=True)
class Panel:
    """One graph.

    Attributes:
        unit: Grafana's name of it.
        note: shown to whoever hovers over the title.
        repeat: a variable; the panel is there once for each of its values, in rows of their own.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    note: str = ""
    kind: Kind = "lines"
    repeat: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Columns of 24, and height."""
        return (4, 4) if self.kind == "stat" else (_WIDTH if self.repeat else 8, 8)


def laid_out(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """Grafana's JSON of panels, one beside the other as long as there is room in the row."""
    found: list[dict[str, Any]] = []
    x = y = row = 0
    for number, panel in enumerate(panels, 1):
        width, height = panel.size
        if x and (x + width > _WIDTH or height != row):
            x, y = 0, y + row
        found.append(_json(number, panel, {"h": height, "w": width, "x": x, "y": y}))
        x, row = x + width, height
    return found


def _json(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "stacked":
        defaults |= {
            "max": 1,
            "custom": {"fillOpacity": 60, "lineWidth": 1, "stacking": {"group": "A", "mode": "normal"}},
        }
    if panel.kind == "heatmap":
        defaults = {}
    repeat = {"repeat": panel.repeat, "repeatDirection": "h"} if panel.repeat else {}
    return {
        "id": number,
        "type": {"lines": "timeseries", "stacked": "timeseries"}.get(panel.kind, panel.kind),
        "title": panel.title,
        "description": panel.note,
        "transparent": False,
        "datasource": _SOURCE,
        "gridPos": place,
        **repeat,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {"refId": chr(65 + index), "datasource": _SOURCE, "expr": expr, "legendFormat": legend}
            | ({"format": "heatmap"} if panel.kind == "heatmap" else {})
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "graphMode": "area",
            "colorMode": "value",
            "justifyMode": "auto",
            "textMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "cellGap": 1,
            "color": {
                "mode": "scheme",
                "scheme": "Blues",
                "fill": "dark-blue",
                "exponent": 0.5,
                "steps": 64,
                "reverse": False,
            },
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "tooltip": {"show": True, "yHistogram": False},
            "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
