"""Draws the dashboards from a real run: ``python -m deploy.grafana.pictures [--minutes 4] [--out docs/images]``.

A server on the bundled model works under a varied load beside a real Prometheus, which is then asked every panel's own
queries; matplotlib draws what it answers. Grafana itself is not part of this. Needs the programs ``pacellm`` and
``prometheus``, and the extras ``bench`` and ``cluster``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from deploy.grafana.build import DASHBOARDS, Panel
from deploy.grafana.live import ask, prometheus
from pacellm.demo.local import running_server, sample_document

Series = list[tuple[str, list[float], list[float]]]
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
_STEP = 2
_INTERVAL = "20s"
_UNITS = {"percentunit": (100.0, "%"), "bytes": (2.0**-20, "MiB"), "cps": (1.0, "per second"),
          "reqps": (1.0, "per second"), "s": (1.0, "seconds"), "short": (1.0, "")}  # fmt: skip


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


def series_of(client: httpx.Client, panel: Panel, start: float, end: float) -> Series:
    """(legend, minutes, values) of what a panel's queries give between two times."""
    found: Series = []
    for query, legend in panel.queries:
        for one in ask(client, "query_range", query, _INTERVAL, start=start, end=end, step=_STEP):
            name = re.sub(r"\{\{(\w+)\}\}", lambda match, one=one: one["metric"].get(match[1], ""), legend)
            points = [((when - start) / 60, float(value)) for when, value in one["values"]]
            found.append((name, [when for when, _ in points], [value for _, value in points]))
    return sorted(found, key=lambda series: [int(number) for number in re.findall(r"\d+", series[0])])


def draw(title: str, panels: list[tuple[Panel, Series]], path: Path) -> None:
    """One dashboard as its panels stand in it, three in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(15, 3.1 * rows + 0.5), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (panel, found) in zip(axes.flat, panels, strict=False):
        scale, unit = _UNITS[panel.unit]
        for name, minutes, values in found:
            axis.plot(minutes, [scale * value for value in values], label=name, linewidth=1.4)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.set_ylabel(unit, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(found) > 1 or found[0][0]:
            axis.legend(fontsize=7, loc="best", ncols=2 if len(found) > 4 else 1, framealpha=0.6)
    for axis in axes[-1]:
        if axis.get_figure() is not None:
            axis.set_xlabel("minutes", fontsize=8)
    figure.suptitle(f"PaceLLM: {title}", fontsize=13, x=0.01, ha="left")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


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
                found = [(panel, series_of(client, panel, started + 20, time.time())) for panel in panels]
                empty += [panel.title for panel, series in found if not series]
                draw(title, [one for one in found if one[1]], args.out / f"dashboard-{dashboard}.png")
    pictures = [f"dashboard-{name}.png" for name in DASHBOARDS]
    print(json.dumps({"pictures": pictures, "panels_without_data": empty}))


if __name__ == "__main__":
    main()
