"""Dashboards, alerts and their pages belong together, and to the metrics of a live server."""

import json
import re
from pathlib import Path

import pytest

from deploy.grafana.build import DASHBOARDS, text

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"


@pytest.fixture(scope="module")
def scrape(live):
    body = {"model": "pacellm-demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    body["session_id"] = "a-name-that-is-no-label"
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200
    return live.http.get("/metrics").text


def families(scraped):
    """Names as the page and queries use them: counters with _total, histograms without a suffix."""
    kinds = re.findall(r"^# TYPE (\S+) (\S+)$", scraped, re.MULTILINE)
    return {name for name, _ in kinds if not name.endswith("_created")}


def named(expression):
    return {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"(?:pacellm|process)_[a-z0-9_]+", expression)
    }


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_dashboards_are_current(name):
    assert (ROOT / f"deploy/grafana/dashboards/{name}.json").read_text() == text(name)


def test_queries_name_metrics_that_exist(scrape):
    used = set()
    for name in DASHBOARDS:
        for panel in json.loads(text(name))["panels"]:
            used |= {metric for target in panel["targets"] for metric in named(target["expr"])}
    expressions = re.sub(r"annotations:.*?(?=- alert|\Z)", "", (PROMETHEUS / "alerts.yml").read_text(), flags=re.DOTALL)
    assert used | named(expressions) <= families(scrape)


def test_page_lists_the_metrics(scrape):
    rows = re.findall(r"^\| (`(?:pacellm|process)_.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == families(scrape)


def test_no_session_is_a_label(scrape):
    assert "a-name-that-is-no-label" not in scrape


def test_every_alert_has_a_section_and_a_test():
    rules = (PROMETHEUS / "alerts.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    anchors = re.findall(r"runbook_url: docs/runbook\.md#(\w+)", rules)
    assert anchors == [alert.lower() for alert in alerts]
    assert sorted(re.findall(r"^## (\w+)", (ROOT / "docs/runbook.md").read_text(), re.M)) == sorted(alerts)
    tested = (PROMETHEUS / "alerts_test.yml").read_text()
    assert all(tested.count(f"alertname: {alert}\n") == 2 for alert in alerts)


def test_rules_and_metrics(promtool, scrape):
    promtool(PROMETHEUS, "check", "config", "prometheus.yml")
    promtool(PROMETHEUS, "test", "rules", "alerts_test.yml")
    promtool(PROMETHEUS, "check", "metrics", text=scrape)
