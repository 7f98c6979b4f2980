"""Sessions over HTTP."""

import json
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from pacellm.config import EngineConfig
from tests.cli.test_commands import free_port
from tests.server.conftest import NAME, start

TEXT = "The access code of the amber archive is 48213. " * 40


def ask(http, session=None, text=TEXT, **changes):
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
    body |= {"ignore_eos": True, **changes}
    if session is not None:
        body["session_id"] = session
    return http.post("/v1/chat/completions", json=body)


@pytest.fixture
def http(live):
    live.http.delete("/v1/sessions")
    return live.http


def test_list_show_delete(http, live):
    assert live.sessions() == []
    assert ask(http, "one").json()["pacellm"]["session"] == "new"
    answer = ask(http, "two")
    assert answer.headers["x-pacellm-session"] == "new"
    assert [item["id"] for item in live.sessions()] == ["two", "one"]
    shown = http.get("/v1/sessions/one").json()
    assert shown["tier"] == "device"
    assert shown["tokens"] > 300
    assert shown["bytes"]["kv"] > 0 < shown["bytes"]["bank"]
    layers = shown["bank"]["layers"]
    assert sorted(layers) == ["1", "4"]
    for layer in layers.values():
        assert 0 < layer["filled"] <= 100
        assert sum(layer[f"{outcome}_rate"] for outcome in ("hit", "fuse", "miss", "empty")) == pytest.approx(1)
    assert http.delete("/v1/sessions/one").json() == {"id": "one", "object": "session.deleted", "deleted": True}
    assert [item["id"] for item in live.sessions()] == ["two"]
    assert http.delete("/v1/sessions").json()["deleted"] == 1
    assert ask(http, "two").json()["pacellm"]["session"] == "new"


def test_reads_by_layer_are_reported(http):
    bank = ask(http, "s").json()["pacellm"]["bank"]
    for name in ("hits", "fuses", "misses", "empty", "merges", "replacements", "filled"):
        assert sum(layer[name] for layer in bank["layers"].values()) == bank[name]
    assert sorted(bank["layers"]) == ["1", "4"]


@pytest.mark.parametrize("method", ["GET", "DELETE", "reset", "fork", "snapshot"])
def test_unknown_ids(http, method):
    path = "/v1/sessions/never"
    answer = http.request(method, path) if method.isupper() else None
    if method in ("reset", "fork"):
        answer = http.post(f"{path}/{method}")
    elif method == "snapshot":
        answer = http.get(f"{path}/snapshot")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "session_not_found")


def test_create_with_ttl(http):
    made = http.post("/v1/sessions", json={"session_id": "timed", "ttl": 3600})
    assert (made.status_code, made.json()["ttl"], made.json()["tokens"]) == (201, 3600, 0)
    assert http.post("/v1/sessions", json={"session_id": "timed"}).json()["error"]["code"] == "session_exists"
    assert ask(http, "timed").json()["pacellm"]["session"] == "new"
    shown = http.get("/v1/sessions/timed").json()
    assert shown["expires"] - shown["last_used"] == 3600
    assert http.post("/v1/sessions").json()["id"]
    for body, param in (({"ttl": -1}, "ttl"), ({"session_id": "a b"}, "session_id"), ({"tll": 1}, "tll")):
        answer = http.post("/v1/sessions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert http.post("/v1/sessions", content=b"[").status_code == 400


def test_several_choices(live, http):
    body = {"temperature": 1.5, "seed": 3, "max_tokens": 12, "n": 3}
    whole = ask(http, "s", **body).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole["usage"]["completion_tokens"] == 36
    assert http.get("/v1/sessions/s").json()["commits"] == 1
    streamed = {}
    chunks = live.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": TEXT}], stream=True, extra_body={"ignore_eos": True}, **body
    )
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(3)] == texts
    first = ask(http, "t", **{**body, "n": 1}).json()
    assert first["choices"] == whole["choices"][:1]


def test_fork_reset(http):
    ask(http, "s")
    made = http.post("/v1/sessions/s/fork", json={"session_id": "t"})
    assert (made.status_code, made.json()["forked_from"]) == (201, "s")
    first = ask(http, "t", TEXT + "?").json()
    assert first["pacellm"]["session"] == "resident"
    assert first["pacellm"]["cached_tokens"] > 300
    assert http.post("/v1/sessions/s/fork", json={"session_id": "t"}).status_code == 409
    assert http.post("/v1/sessions/t/reset").json()["tokens"] == 0
    assert ask(http, "t").json()["pacellm"]["session"] == "new"


@pytest.mark.parametrize("kv", [False, True])
def test_snapshots_travel(http, kv):
    ask(http, "s")
    data = http.get("/v1/sessions/s/snapshot", params={"kv": str(kv).lower()})
    assert data.status_code == 200
    assert (len(data.content) > 2_000_000) == kv
    follow_up = ask(http, "s", TEXT + "?").json()
    put = http.put("/v1/sessions/copy/snapshot", content=data.content)
    assert (put.status_code, put.json()["tokens"]) == (200, http.get("/v1/sessions/copy").json()["tokens"])
    copied = ask(http, "copy", TEXT + "?").json()
    assert copied["pacellm"]["session"] == ("resident" if kv else "replayed")
    assert copied["choices"] == follow_up["choices"]
    bad = bytearray(data.content)
    bad[len(bad) // 2] ^= 4
    before = http.get("/v1/sessions/copy").json()
    answer = http.put("/v1/sessions/copy/snapshot", content=bytes(bad))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "snapshot_refused")
    assert http.get("/v1/sessions/copy").json() == before


def test_snapshots_over_the_limit():
    with start(EngineConfig(kv_cache_memory=2**28), max_snapshot_bytes=1000) as live:
        ask(live.http, "s")
        assert live.http.get("/v1/sessions/s/snapshot").status_code == 400
        assert live.http.put("/v1/sessions/s/snapshot", content=b"x" * 1001).status_code == 413
        assert (
            live.http.put("/v1/sessions/s/snapshot", content=b"x" * 900).json()["error"]["code"] == "snapshot_refused"
        )


def test_a_session_deleted_while_it_streams(http):
    ask(http, "s")
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "session_id": "s", "stream": True}
    body |= {"max_tokens": 5000, "ignore_eos": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        assert http.delete("/v1/sessions/s").status_code == 200
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "session_deleted"
    assert http.get("/v1/sessions/s").status_code == 404


def serve(path, *arguments):
    """A server process with a session directory, and a client."""
    port = free_port()
    command = [sys.executable, "-m", "pacellm.cli", "serve", "--port", str(port), "--session-dir", str(path)]
    server = subprocess.Popen(
        [*command, "--max-model-len", "16K", "--kv-cache-memory-bytes", "256M", *arguments],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in server.stderr:
        if "running on" in line:
            break
    threading.Thread(target=server.stderr.read, daemon=True).start()
    return server, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)


@pytest.mark.parametrize(
    ("end", "arguments", "status"),
    [(signal.SIGTERM, (), "restored"), (signal.SIGKILL, ("--session-sync",), "replayed")],
)
def test_a_session_goes_on_after_a_restart(tmp_path, end, arguments, status):
    with start(EngineConfig(kv_cache_memory=2**28, max_model_len=2**14)) as live:
        wanted = [ask(live.http, "s", TEXT + tail).json() for tail in ("", "?", "!")]
    found = []
    for tail in ("", "?", "!"):
        server, http = serve(tmp_path, *arguments)
        found.append(ask(http, "s", TEXT + tail).json())
        http.close()
        server.send_signal(end)
        assert server.wait(60) in (0, -end)
        server.stderr.close()
    assert [answer["choices"] for answer in found] == [answer["choices"] for answer in wanted]
    assert [answer["pacellm"]["session"] for answer in found] == ["new", status, status]
