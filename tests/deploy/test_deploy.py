"""Dashboards, alerts and their pages belong together, and to the metrics of a live server."""

import json
import re
from pathlib import Path

import pytest
import yaml

from deploy.grafana.build import DASHBOARDS, text

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
RUNBOOK = "https://runbooks.example/pacellm/runbook.md"


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
    links = re.findall(r"runbook_url: (\S+)#(\w+)", rules)
    assert [anchor for _, anchor in links] == [alert.lower() for alert in alerts]
    (page,) = {page for page, _ in links}
    assert page == RUNBOOK
    assert sorted(re.findall(r"^## (\w+)", (ROOT / "docs/runbook.md").read_text(), re.M)) == sorted(alerts)
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    found = [(rule["alertname"], bool(rule["exp_alerts"])) for test in tests for rule in test["alert_rule_test"]]
    assert {(alert, fires) for alert in alerts for fires in (True, False)} == set(found)


def test_an_alert_fires_when_the_server_is_down():
    """``up`` is the one series that is there when a server is not, under the name that each scraper gives its job."""
    for path in ("prometheus/prometheus.yml",):
        (job,) = yaml.safe_load((ROOT / "deploy" / path).read_text())["scrape_configs"]
        assert job["job_name"] == "pacellm"
    for path in ("components/monitoring/servicemonitor.yaml", "overlays/rayservice/podmonitor.yaml"):
        spec = yaml.safe_load((ROOT / "deploy/kubernetes" / path).read_text())["spec"]
        for endpoint in spec.get("endpoints") or spec["podMetricsEndpoints"]:
            assert {"targetLabel": "job", "replacement": "pacellm"} in endpoint["relabelings"]


def test_rules_and_metrics(promtool, scrape):
    promtool(PROMETHEUS, "check", "config", "prometheus.yml")
    promtool(PROMETHEUS, "test", "rules", "alerts_test.yml")
    promtool(PROMETHEUS, "check", "metrics", text=scrape)
