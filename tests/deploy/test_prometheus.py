"""A real Prometheus over a real server under load answers the query of every panel."""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from pacellm.config import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.experts.cluster import shuffled
from pacellm.experts.layout import Layout
from pacellm.model.layout import apply_layout, model_fingerprint, weight_features
from pacellm.model.load import load as load_model
from tests.server.conftest import start

ROOT = Path(__file__).parents[2]
VARIABLES = {"$__rate_interval": "20s", "$model": ".*", "$instance": ".*"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the Debian package prometheus"),
]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


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
def prometheus(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = EngineConfig(
        kv_cache_memory=2**28,
        session_memory=2**21,
        session_host_memory=2**28,
        bank=PAConfig(preset="paper", segment=256),
    )
    with start(config, model=with_experts()) as server:
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: pacellm\n  static_configs:\n"
            f"  - targets: ['{server.url.removeprefix('http://')}']\n"
        )
        command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            load(server, 20)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                yield client
        finally:
            process.terminate()
            process.wait(30)


def test_every_panel_has_data(prometheus):
    empty = []
    for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                query = target["expr"]
                for name, value in VARIABLES.items():
                    query = query.replace(name, value)
                answer = prometheus.get("/api/v1/query", params={"query": query}).json()
                values = [float(one["value"][1]) for one in answer.get("data", {}).get("result", [])]
                if not values or any(value != value for value in values):
                    empty.append(f"{path.name}: {panel['title']}: {query}: {answer}")
    assert not empty, "\n".join(empty)
