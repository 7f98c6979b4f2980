"""What sending one token costs the server: ``python load_tests/events_bench.py [--peer CHECKOUT]``.

The app as it is served, with a stand-in for the engine's thread that hands over one token for each of ``--streams``
chat streams at a time; the client is another process. Counted is the CPU time of the event loop's thread, so other
work on the machine matters little. With ``--peer``, another checkout is measured in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import uvicorn

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine
from pacellm.model.load import load
from pacellm.server import connection, launcher
from pacellm.server.app import create_app
from pacellm.server.service import Service
from pacellm.server.settings import Settings
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Admitted, Delta, Event, Finished, FinishReason, GenerationRequest, Usage

_STEP = 0.02  # seconds between tokens, as a model's steps


class Puppet:
    """In the place of the engine's thread: waits for all streams, then says one token of each at a time."""

    def __init__(self, service: Service, count: int, new: int) -> None:
        self._service, self._count, self._new = service, count, new
        self._waiting: list[str] = []
        self._ready = threading.Event()
        self.cpu_seconds = 0.0
        service.thread.submit = self._submit  # type: ignore[method-assign]
        service.thread.abort = lambda request_id: None  # type: ignore[method-assign]

    def _submit(self, request: GenerationRequest) -> None:
        self._service._deliver([(request.request_id, Admitted("none", 0))])
        self._waiting.append(request.request_id)
        if len(self._waiting) == self._count:
            threading.Thread(target=self._play, args=(tuple(self._waiting),)).start()
            self._waiting = []

    def _play(self, ids: tuple[str, ...]) -> None:
        time.sleep(0.3)  # heads are out
        loop = self._service._loop
        assert loop is not None

        async def spent() -> float:
            return time.thread_time()

        started = asyncio.run_coroutine_threadsafe(spent(), loop).result()
        for token in range(self._new):
            self._service._deliver([(name, Delta(" word", (token,))) for name in ids])
            time.sleep(_STEP)
        ended = asyncio.run_coroutine_threadsafe(spent(), loop).result()
        self.cpu_seconds = ended - started
        end = Finished(FinishReason.LENGTH, Usage(9, 0, self._new), "none", "off", None, 0.0, 0.0, 0.0)
        events: list[tuple[str, Event]] = [(name, end) for name in ids]
        self._service._deliver(events)


CLIENT = """
import asyncio, json, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 9}).encode()
lines = ["POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
head = "\\r\\n".join(lines) + "\\r\\n\\r\\n"
async def one():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    size = events = 0
    while data := await reader.read(65536):
        size += len(data)
        events += data.count(b"data: ")
    return events
async def main():
    return sum(await asyncio.gather(*(one() for _ in range(count))))
print(asyncio.run(main()))
"""


def measure(count: int, new: int) -> float:
    """Microseconds of the event loop's thread for one token of one stream."""
    tokenizer = ChatTokenizer(MODEL_PATH)
    engine = Engine(load(MODEL_PATH), EngineConfig(max_num_seqs=count, kv_cache_memory=2**28), tokenizer.backend)
    service = Service(engine, tokenizer, Settings("pacellm-demo"))
    puppet = Puppet(service, count, new)
    limits = connection.ConnectionLimits(4 * count)
    config = launcher.config_of(create_app(service), limits, host="127.0.0.1", port=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [sys.executable, "-c", CLIENT, str(port), str(count)]
    events = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    server.should_exit = True
    thread.join()
    if events < count * new:
        raise SystemExit(f"only {events} events came of {count * new}")
    return 1e6 * puppet.cpu_seconds / (count * new)


def in_process(checkout: Path, count: int, new: int) -> float:
    """The same in a process of its own, on a checkout's code."""
    command = [sys.executable, __file__, "--once", "--streams", str(count), "--new", str(new)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(checkout)}
    )
    return json.loads(done.stdout.splitlines()[-1])["us_per_event"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="another checkout")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps({"us_per_event": measure(args.streams, args.new)}))
        return
    checkouts = {"this": Path(__file__).parent.parent, **({"peer": args.peer} if args.peer else {})}
    found: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(args.rounds):
        for name, checkout in checkouts.items():
            found[name].append(in_process(checkout, args.streams, args.new))
    rows = {
        name: {
            "us_per_event": round(statistics.median(each), 1),
            "events_per_core_second": round(1e6 / statistics.median(each)),
        }
        for name, each in found.items()
    }
    print(json.dumps({"bench": "events", "streams": args.streams, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
