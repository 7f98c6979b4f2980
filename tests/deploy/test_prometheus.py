"""A real Prometheus over a real server under load answers the query of every panel."""

import dataclasses
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from deploy.grafana.live import ask, prometheus
from deploy.grafana.queries import outcome_rate
from pacellm.config import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.experts.apply import apply_layout, model_fingerprint, weight_features
from pacellm.experts.cluster import shuffled
from pacellm.experts.layout import Layout
from pacellm.memory.reads import OUTCOMES, rates
from pacellm.model.load import load as load_model
from pacellm.model.retrieval import Retrieval
from tests.server.conftest import start

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the Debian package prometheus"),
]


def load(server, seconds):
    """Sessions that take turns, so that idle ones leave the device and come back; what answers say of bank reads."""
    until, number, reads = time.monotonic() + seconds, 0, {}
    while time.monotonic() < until:
        text = f"The code of archive {number % 3} is {number % 3}{number % 3}. " * 400
        question = f"What is the code of archive {number % 3}, asked {number} times?"
        messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
        body = {"model": "pacellm-demo", "messages": messages, "max_tokens": 8, "session_id": f"s{number % 3}"}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        for layer, told in answer.json()["pacellm"]["bank"]["layers"].items():
            reads.setdefault(layer, Counter()).update({name: told[name] for name in OUTCOMES})
        number += 1
    return reads


def wait_for_scrapes(client):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if ask(client, "query", "count_over_time(up[1m]) > 2", "20s"):
                return
        except (httpx.TransportError, ValueError):
            pass  # it starts
        time.sleep(0.2)
    raise AssertionError("Prometheus does not scrape")


def with_experts():
    """The bundled model with a layout and a layer that retrieves, so that all panels have something to show."""
    model = dataclasses.replace(load_model(MODEL_PATH), retrieval=Retrieval((2,)))
    layers = {layer: shuffled(one, 64, 0) for layer, one in weight_features(model.module).items()}
    return apply_layout(model, Layout(layers, "random", "none", 0, model_fingerprint(model.module), {}))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the answers of a server under load said, and the Prometheus that watched it from its start."""
    config = EngineConfig(
        kv_cache_memory=2**28,
        session_memory=2**21,
        session_host_memory=2**28,
        working_memory=2048,
        working_memory_window=512,
        bank=PAConfig(preset="paper", segment=256),
    )
    with start(config, model=with_experts()) as server:
        folder = tmp_path_factory.mktemp("prometheus")
        with prometheus(folder, server.url.removeprefix("http://")) as client:
            wait_for_scrapes(client)  # what grows before them is not seen to grow
            reads = load(server, 20)
            time.sleep(3)  # another scrape
            yield reads, client


def test_every_panel_has_data(both):
    """From one of its queries at least: some ask for what has not happened."""
    empty = []
    for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            found = [one for target in panel["targets"] for one in ask(both[1], "query", target["expr"], "5m")]
            values = [float(one["value"][1]) for one in found]
            if not values or any(value != value for value in values):
                empty.append(f"{path.name}: {panel['title']}: {found}")
    assert not empty, "\n".join(empty)


def test_one_hit_rate(both):
    """The dashboard's is that of the counts in the answers."""
    reads, client = both
    found = ask(client, "query", outcome_rate("hits", "layer"), "10m")
    drawn = {one["metric"]["layer"]: float(one["value"][1]) for one in found}
    assert drawn == pytest.approx({layer: rates(counts)["hit_rate"] for layer, counts in reads.items()}, rel=0.01)
