"""Dashboards, alerts and their pages belong together, and to the metrics of a live server."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
BUILD = runpy.run_path(str(ROOT / "deploy/grafana/build.py"))
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs the Debian package prometheus")


@pytest.fixture(scope="module")
def scrape(live):
    body = {"model": "pacellm-demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    body["session_id"] = "a-name-that-is-no-label"
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200
    return live.http.get("/metrics").text


def families(text):
    """Names as the page and queries use them: counters with _total, histograms without a suffix."""
    kinds = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    return {name for name, _ in kinds if not name.endswith("_created")}


def named(text):
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"pacellm_[a-z0-9_]+", text)}


@pytest.mark.parametrize("name", sorted(BUILD["DASHBOARDS"]))
def test_dashboards_are_current(name):
    assert (ROOT / f"deploy/grafana/dashboards/{name}.json").read_text() == BUILD["text"](name)


def test_queries_name_metrics_that_exist(scrape):
    used = set()
    for name in BUILD["DASHBOARDS"]:
        for panel in json.loads(BUILD["text"](name))["panels"]:
            used |= {metric for target in panel["targets"] for metric in named(target["expr"])}
    expressions = re.sub(r"annotations:.*?(?=- alert|\Z)", "", (PROMETHEUS / "alerts.yml").read_text(), flags=re.DOTALL)
    assert used | named(expressions) <= families(scrape)


def test_page_lists_the_metrics(scrape):
    assert set(re.findall(r"^\| `(pacellm_\w+)", (ROOT / "docs/metrics.md").read_text(), re.M)) == families(scrape)


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


@needs_promtool
def test_promtool(scrape):
    def run(*command, text=None):
        done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    run("check", "config", "prometheus.yml")
    run("test", "rules", "alerts_test.yml")
    run("check", "metrics", text=scrape)
