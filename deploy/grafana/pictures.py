"""Draws the dashboards from a real run: ``python -m deploy.grafana.pictures [--minutes 4] [--out docs/images]``.

A server on the bundled model works under a varied load beside a real Prometheus, which is then asked every panel's own
queries; matplotlib draws what it answers. Grafana itself is not part of this. Needs the programs ``pacellm`` and
``prometheus``, and the extras ``bench`` and ``cluster``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from deploy.grafana.build import DASHBOARDS
from deploy.grafana.drawing import asked, draw
from deploy.grafana.live import prometheus
from pacellm.demo.local import running_server, sample_document

FLAGS = [
    *("--session-memory", "24M", "--session-host-memory", "256M", "--session-disk-size", "256M", "--pa-memory", "16M"),
    *("--working-memory", "2560", "--working-memory-window", "512"),
    *(
        "--pa-preset",
        "paper",
        "--accept-worse-answers",
        "--pa-segment",
        "256",
        "--kv-cache-memory-bytes",
        "512M",
        "--max-num-seqs",
        "8",
    ),
]


class Load:
    """Clients that go on until told to end: sessions that take turns, short streams, long prompts, mistakes."""

    def __init__(self, url: str, *, sessions: int = 16) -> None:
        self._url, self._ended = url, threading.Event()
        self._documents = [sample_document(900 + 250 * number, number) for number in range(sessions)]
        self._threads = [threading.Thread(target=one) for one in (self._talk, self._talk, self._chat, self._read_long)]

    def run(self, seconds: float) -> None:
        """All of them, for so long."""
        for thread in self._threads:
            thread.start()
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            print(f"\r{left:4.0f} s to go ", end="", file=sys.stderr, flush=True)
            time.sleep(min(1.0, left))
        self._ended.set()
        for thread in self._threads:
            thread.join()
        print(file=sys.stderr)

    def _talk(self) -> None:
        """Questions about documents, in sessions; the last ones are asked more often. Some forget the document."""
        chosen = random.Random(threading.get_ident())
        with httpx.Client(base_url=self._url, timeout=None) as client:
            while not self._ended.is_set():
                number = min(chosen.randrange(24), len(self._documents) - 1)
                document = self._documents[number]
                question = chosen.choice(document.facts).question
                text = question if chosen.random() < 0.05 else f"{document.text}\n\n{question}"
                messages = [{"role": "user", "content": text}]
                body = {"messages": messages, "max_tokens": 12, "session_id": f"s{number}"}
                client.post("/v1/chat/completions", json=body)
                time.sleep(chosen.random())

    def _chat(self) -> None:
        """Short streams, at times one too many, and a mistake now and then."""
        chosen = random.Random(1)
        with httpx.Client(base_url=self._url, timeout=None) as client:
            while not self._ended.is_set():
                body = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 40, "ignore_eos": True,
                        "stream": True, "temperature": 2.5 if chosen.random() < 0.1 else 0.7}  # fmt: skip
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    for _ in response.iter_lines():
                        if chosen.random() < 0.002:
                            break
                time.sleep(0.3 * chosen.random())

    def _read_long(self) -> None:
        """A long prompt from time to time; one of three is given up."""
        with httpx.Client(base_url=self._url, timeout=None) as client:
            number = 0
            while not self._ended.wait(12):
                number += 1
                text = sample_document(24_000, 100 + number).text
                body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "stream": True}
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    for count, _ in enumerate(response.iter_lines()):
                        if number % 3 == 0 and count > 1:
                            break


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout = folder / "layout.safetensors"
        subprocess.run([sys.executable, "-m", "pacellm.cli", "cluster", "-o", str(layout)], check=True)
        flags = [*FLAGS, "--session-dir", str(folder / "sessions"), "--ce-layout", str(layout)]
        with running_server(flags) as server, prometheus(folder, server.base_url.netloc.decode()) as client:
            started = time.time()
            Load(str(server.base_url)).run(60 * args.minutes)
            empty = []
            for dashboard, (title, panels) in DASHBOARDS.items():
                found = [one for panel in panels for one in asked(client, panel, started + 20, time.time())]
                empty += [panel.title for panel, series in found if not series]
                draw(title, [one for one in found if one[1]], args.out / f"dashboard-{dashboard}.png")
    pictures = [f"dashboard-{name}.png" for name in DASHBOARDS]
    print(json.dumps({"pictures": pictures, "panels_without_data": empty}))


if __name__ == "__main__":
    main()
