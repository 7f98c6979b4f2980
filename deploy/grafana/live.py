"""A real Prometheus beside a real server, and the panels' queries asked of it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

VARIABLES = {"$model": ".*", "$instance": ".*", "$layer": ".*"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def prometheus(folder: Path, target: str, *, every: int = 1) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes ``target`` ("host:port") every so many seconds, and a client of it."""
    port = free_port()
    (folder / "prometheus.yml").write_text(
        f"global: {{scrape_interval: {every}s}}\nscrape_configs:\n- job_name: pacellm\n  static_configs:\n"
        f"  - targets: ['{target}']\n"
    )
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def ask(
    client: httpx.Client,
    path: str,
    query: str,
    interval: str,
    variables: Mapping[str, str] = MappingProxyType({}),
    **params: Any,
) -> list[dict[str, Any]]:
    """The series of a panel's query, its variables put in, all values of those that are not given; raises on an error
    of Prometheus."""
    for name, value in {**VARIABLES, **variables, "$__rate_interval": interval}.items():
        query = query.replace(name, value)
    answer = client.get(f"/api/v1/{path}", params={"query": query, **params}).json()
    if answer["status"] != "success":
        raise ValueError(f"{query}: {answer}")
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found
