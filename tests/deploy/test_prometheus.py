"""A real Prometheus over a real server under load answers the query of every panel."""

import json
import shutil
import time
from pathlib import Path

import pytest

from deploy.grafana.live import ask, prometheus
from pacellm.config import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.experts.apply import apply_layout, model_fingerprint, weight_features
from pacellm.experts.cluster import shuffled
from pacellm.experts.layout import Layout
from pacellm.model.load import load as load_model
from tests.server.conftest import start

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the Debian package prometheus"),
]


def load(server, seconds):
    """Sessions that take turns, so that idle ones leave the device and come back."""
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        text = f"The code of archive {number % 3} is {number}. " * 60
        messages = [{"role": "user", "content": f"{text}\n\nWhat is the code of archive {number % 3}?"}]
        body = {"model": "pacellm-demo", "messages": messages, "max_tokens": 8, "session_id": f"s{number % 3}"}
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
        number += 1


def with_experts():
    """The bundled model with a layout, so that the experts' panels have something to show."""
    model = load_model(MODEL_PATH)
    layers = {layer: shuffled(one, 64, 0) for layer, one in weight_features(model.module).items()}
    return apply_layout(model, Layout(layers, "random", "none", 0, model_fingerprint(model.module), {}))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    config = EngineConfig(
        kv_cache_memory=2**28,
        session_memory=2**21,
        session_host_memory=2**28,
        bank=PAConfig(preset="paper", segment=256),
    )
    with start(config, model=with_experts()) as server:
        folder = tmp_path_factory.mktemp("prometheus")
        with prometheus(folder, server.url.removeprefix("http://")) as client:
            load(server, 20)
            yield client


def test_every_panel_has_data(client):
    empty = []
    for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found = ask(client, "query", target["expr"], "20s")
                values = [float(one["value"][1]) for one in found]
                if not values or any(value != value for value in values):
                    empty.append(f"{path.name}: {panel['title']}: {target['expr']}: {found}")
    assert not empty, "\n".join(empty)
