"""Dashboards as Grafana reads them, and their hit rate against the API's."""

import json

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.build import BANKS, DASHBOARDS, dashboard, text
from deploy.grafana.live import VARIABLES
from deploy.grafana.queries import outcome_rate, outcomes
from pacellm.memory.reads import OUTCOMES, rates

COUNTS = {
    "0": {"hits": 28, "fuses": 4, "misses": 1, "empty": 67},
    "3": {"hits": 0, "fuses": 0, "misses": 5, "empty": 15},
}


def lost(ours, read, place="$"):
    """What Grafana's own model of dashboards leaves out or changes; what it adds are its defaults."""
    if isinstance(ours, dict) and isinstance(read, dict):
        for key, value in ours.items():
            if key in read:
                yield from lost(value, read[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        for number, (mine, theirs) in enumerate(zip(ours, read, strict=True)):
            yield from lost(mine, theirs, f"{place}[{number}]")
    elif ours != read:
        yield f"{place}: {ours!r} became {read!r}"


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_grafana_reads_all_of_it(name):
    register_default_plugins()
    written = json.loads(text(name))
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))
    assert not list(lost(written, read))
    assert {panel["type"] for panel in read["panels"]} <= {"timeseries", "stat", "heatmap"}


def test_what_grafana_does_not_know_is_found():
    register_default_plugins()
    wrong = dashboard("serving")
    wrong["panels"][0]["options"]["graphMood"] = "area"
    wrong["panels"][-1]["targets"][0]["legend"] = "x"
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(wrong)))))
    assert [place.rsplit(".")[-1] for place in lost(wrong, read)] == ["graphMood", "legend"]


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_panels_lie_beside_each_other(name):
    taken = set()
    for panel in dashboard(name)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_working_memory_comes_first():
    assert BANKS[0].title == "Attention called back"
    assert next(panel for panel in BANKS if panel.kind == "lines").title == "Attention to what was called back"


def written_out(query):
    for name, value in {**VARIABLES, "$__rate_interval": "5m"}.items():
        query = query.replace(name, value)
    return query


def test_the_hit_rate_of_dashboards_is_the_one_of_the_api(promtool, tmp_path):
    """What Prometheus makes of counters is what :func:`rates` makes of them."""
    series = [
        {
            "series": f'pacellm_bank_reads_total{{instance="a", model_name="m", preset="observe", layer="{layer}", '
            f'outcome="{outcome}"}}',
            "values": f"0+{counts[counter]}x30",
        }
        for layer, counts in COUNTS.items()
        for counter, outcome in OUTCOMES.items()
    ]  # fmt: skip
    both = {name: sum(counts[name] for counts in COUNTS.values()) for name in OUTCOMES}
    expected = [
        (
            outcome_rate("hits", "layer"),
            {f'{{layer="{layer}"}}': rates(counts)["hit_rate"] for layer, counts in COUNTS.items()},
        )
    ]
    expected.append((outcome_rate("hits"), {"{}": rates(both)["hit_rate"]}))
    expected += [(query, {"{}": rates(COUNTS["0"])[f"{name}_rate"]}) for query, name in outcomes(', layer="0"')]
    tests = [
        {
            "expr": f"round({written_out(query)}, 0.0001)",
            "eval_time": "20m",
            "exp_samples": [{"labels": labels, "value": round(value, 4)} for labels, value in samples.items()],
        }
        for query, samples in expected
    ]
    whole = {"rule_files": [], "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}]}
    (tmp_path / "rates.yml").write_text(json.dumps(whole))  # JSON is YAML
    promtool(tmp_path, "test", "rules", "rates.yml")
