"""The worst bodies, one after another: ``python -m load_tests.scenarios.heavy_bodies``.

Bodies of up to ``--mebibytes`` that are as hard to read, check or tokenise as any, for ``--seconds``. Meanwhile a
process of its own asks ``/health`` every few milliseconds: no answer may take a second. Each body must get 200 or a
4xx, and none may cost the server more than 256 MiB. The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from load_tests.scenarios.servers import OWN_KEY, OwnServer, own_server, parser, report

LIMIT_SECONDS = 1.0
LIMIT_MIB = 4 * 64  # four bodies of the server's limit
_CHAT, _TEXT, _IDS = "/v1/chat/completions", "/v1/completions", "/detokenize"
_PAUSE = 0.005


def _filled(head: str, item: str, tail: str) -> Callable[[int], bytes]:
    """A body of items as long as it may be."""

    def make(size: int) -> bytes:
        count = (size - len(head) - len(tail)) // len(item.encode())
        return (head + (item * count).removesuffix(",") + tail).encode()

    return make


def _counted(head: str, item: str, tail: str, count: int) -> Callable[[int], bytes]:
    """A body of so many items, however long it may be."""
    return lambda size: (head + (item * count).removesuffix(",") + tail).encode()


def _message(text: str) -> tuple[str, str, str]:
    return '{"max_tokens":1,"messages":[{"role":"user","content":"', text, '"}]}'


def _keys(head: str, tail: str, value: str = "1") -> Callable[[int], bytes]:
    """An object with other keys throughout."""

    def make(size: int) -> bytes:
        count = (size - len(head) - len(tail)) // (11 + len(value))
        return (head + ",".join(f'"{number:07d}":{value}' for number in range(count)) + tail).encode()

    return make


def _called(arguments: str) -> Callable[[int], bytes]:
    def make(size: int) -> bytes:
        text = "[" + (arguments * ((min(size, 2**24) - 200) // len(arguments))).removesuffix(",") + "]"
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": text}}
        return json.dumps({"messages": [{"role": "assistant", "tool_calls": [call]}]}).encode()

    return make


BODIES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "tiny messages": (_CHAT, _filled('{"messages":[', '{"role":"user","content":"a"},', "]}")),
    "as many messages as may be": (
        _CHAT, _counted('{"n":0,"messages":[', '{"role":"user","content":"a"},', "]}", 16_384)),
    "empty messages": (_CHAT, _filled('{"messages":[', "{},", "]}")),
    "unknown keys": (_CHAT, _keys("{", "}")),
    "as many unknown keys as may be": (_CHAT, lambda size: _keys("{", "}")(min(size, 2**17 * 12))),
    "messages of unknown keys": (_CHAT, _keys('{"messages":[{', "}]}")),
    "logit_bias": (_CHAT, _keys('{"messages":[],"logit_bias":{', "}}")),
    "wrong logit_bias": (_CHAT, lambda size: _keys('{"logit_bias":{', "}}", '"x"')(min(size, 2**17 * 14))),
    "lists in lists": (_CHAT, _filled('{"messages":[', "[],", "]}")),
    "deep": (_CHAT, _filled('{"messages":', "[", "")),
    "a text of one letter": (_CHAT, _filled(*_message("a"))),
    "a text of spaces": (_CHAT, _filled(*_message(" "))),
    "a text of escapes": (_CHAT, _filled(*_message("\\u0416"))),
    "a text with one wide character": (_CHAT, _filled(_message("")[0] + "😀", "a", '"}]}')),
    "wide characters": (_CHAT, _filled(*_message("😀"))),
    "2 MB of spaces": (_CHAT, _counted(*_message(" "), 2**21 - 2**16)),
    "2 MB of letters": (_CHAT, _counted(*_message("qzx"), 2**19)),
    "1 MB of wide characters": (_CHAT, _counted(*_message("🤖"), 2**18)),
    "2 MB cut to the last token": (
        _CHAT, _counted('{"truncate_prompt_tokens":1,' + _message("")[0][1:], "xq ", '"}]}', 2**19)),
    "special tokens as text": (_CHAT, _counted(*_message("<|end|><|user|>"), 2**17)),
    "half special tokens": (_CHAT, _counted(*_message("<|us"), 2**19)),
    "arguments of lists": (_CHAT, _called("[],")),
    "arguments of numbers": (_CHAT, _called("1,")),
    "a schema": (
        _CHAT,
        _counted('{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema","json_schema":'
                 '{"name":"a","schema":{"enum":[', "1,", "]}}}}", 2**20)),
    "choices": (_CHAT, _counted('{"messages":[{"role":"user","content":"a"}],"structured_outputs":{"choice":[', '"a",',
                                "]}}", 16_384)),
    "ids": (_TEXT, _filled('{"prompt":[', "7,", "]}")),
    "a million ids": (_TEXT, _counted('{"prompt":[', "777,", "]}", 2**20)),
    "a million ids and a word": (_TEXT, _counted('{"prompt":["a",', "7,", "]}", 2**20)),
    "a million words": (_TEXT, _counted('{"prompt":[', '"a",', "]}", 2**20)),
    "a million ids to text": (_IDS, _counted('{"tokens":[', "777,", "]}", 2**20)),
    "a text to count": ("/tokenize", _filled('{"prompt":"', "a b ", '"}')),
    "1 MB to count and show": ("/tokenize", _counted('{"return_token_strs":true,"prompt":"', "a b ", '"}', 2**18 - 64)),
    "items": ("/v1/responses", _filled('{"input":[', '{"role":"user","content":"a"},', "]}")),
    "no JSON": (_CHAT, _filled("", '"', "")),
    "zeros": (_CHAT, lambda size: bytes(size)),
}  # fmt: skip


def probe(url: str) -> Iterator[float]:
    """Seconds of one answer after another, on one connection where that stays open."""
    address = urlsplit(url)
    link = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    while True:
        started = time.perf_counter()
        link.request("GET", "/health")
        link.getresponse().read()
        yield time.perf_counter() - started


def _probe_until_told(url: str) -> None:
    """The other process: prints the slowest answer since the last line it was sent, at every line."""
    import threading

    worst, lock = [0.0], threading.Lock()

    def ask() -> None:
        for seconds in probe(url):
            with lock:
                worst[0] = max(worst[0], seconds)
            time.sleep(_PAUSE)

    threading.Thread(target=ask, daemon=True).start()
    for _ in sys.stdin:
        with lock:
            print(worst[0], flush=True)
            worst[0] = 0.0


class Prober:
    """A process that asks for health, so that nothing this one does slows it."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "load_tests.scenarios.heavy_bodies", "--probe", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def worst(self) -> float:
        """The slowest answer since the last call, in seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """Stop."""
        self._process.kill()
        self._process.wait()


def send(url: str, key: str, path: str, body: bytes) -> int:
    """The status; 0 where the connection was cut before it came."""
    address = urlsplit(url)
    link = http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        link.request("POST", path, body, headers)
        answer = link.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        link.close()


def run(server: OwnServer, key: str, *, seconds: float, mebibytes: int) -> tuple[dict[str, Any], list[str]]:
    """All bodies, again and again: (facts, failures)."""
    prober, failures = Prober(server.url), []
    found: dict[str, dict[str, float]] = {}
    time.sleep(1.0)
    prober.worst()
    until, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        for name, (path, make) in BODIES.items():
            body = make(mebibytes * 2**20)
            server.forget_peak()
            before, started = server.memory(), time.monotonic()
            status = send(server.url, key, path, body)
            taken, wait = time.monotonic() - started, prober.worst()
            grown = max(0, server.peak_memory() - before) / 2**20
            facts = found.setdefault(name, {"seconds": 0.0, "worst_health_ms": 0.0, "peak_mib": 0.0})
            facts |= {"mib": round(len(body) / 2**20, 1), "status": status,
                      "seconds": max(facts["seconds"], round(taken, 2)),
                      "worst_health_ms": max(facts["worst_health_ms"], round(1000 * wait, 1)),
                      "peak_mib": max(facts["peak_mib"], round(grown, 1))}  # fmt: skip
            found[name] = facts
            if status != 200 and not 400 <= status < 500:
                failures.append(f"{name}: status {status}")
            if wait > LIMIT_SECONDS:
                failures.append(f"{name}: /health took {wait:.2f} s")
            if grown > LIMIT_MIB:
                failures.append(f"{name}: {grown:.0f} MiB for a body of {facts['mib']} MiB")
        rounds += 1
    prober.end()
    worst = max(facts["worst_health_ms"] for facts in found.values())
    return {"rounds": rounds, "worst_health_ms": worst, "bodies": found}, failures


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    options = parser(__doc__ or "", takes_url=False)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--mebibytes", type=int, default=64)
    options.add_argument("--probe", help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.probe:
        _probe_until_told(args.probe)
        return 0
    if args.small:
        args.seconds, args.mebibytes = 1.0, 16
    with own_server(["--kv-cache-memory-bytes", "1G"]) as server:
        facts, failures = run(server, OWN_KEY, seconds=args.seconds, mebibytes=args.mebibytes)
        if "Traceback" in server.log():
            failures.append(f"the server logged an exception: {server.log()[-2000:]}")
    return report("heavy_bodies", facts, failures)


if __name__ == "__main__":
    raise SystemExit(main())
