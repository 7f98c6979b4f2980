"""What one client may have: memory for bodies, text, sessions."""

import json
import socket
import threading
from pathlib import Path

import pytest

from pacellm.config import EngineConfig
from pacellm.errors import ContextLengthExceeded, Overloaded
from pacellm.server.auth import Keys
from pacellm.server.body_budget import BodyBudget
from pacellm.text import pieces
from tests.server.conftest import NAME, start

KEYS = Keys({"alice-key-1": "alice", "bob-key-22": "bob"})
ALICE, BOB = ({"Authorization": f"Bearer {key}"} for key in ("alice-key-1", "bob-key-22"))
MEBI = 2**20
SMALL = EngineConfig(kv_cache_memory=2**28, max_model_len=4096)


@pytest.fixture(scope="module")
def limited():
    with start(SMALL, keys=KEYS, max_sessions_per_key=5) as server:
        yield server


def test_an_intake_is_shared_by_tenants():
    intake = BodyBudget(8 * MEBI)
    with intake.claim("a") as one, intake.claim("a") as two, intake.claim("b") as three:
        one.grow(3 * MEBI)
        with pytest.raises(Overloaded) as caught:
            two.grow(2 * MEBI)
        assert caught.value.code == "rate_limit_exceeded"
        three.grow(4 * MEBI)
        assert 6 * MEBI < intake.num_bytes <= 7 * MEBI
        with intake.claim("c") as four, pytest.raises(Overloaded):
            four.grow(2 * MEBI)
        with intake.claim("d") as small:
            small.grow(60_000)
    assert intake.num_bytes == 0


def test_bodies_that_are_refused_leave_no_claim(limited):
    for body in (b"{", b" " * MEBI, json.dumps({"prompt": "a", "max_tokens": 0}).encode() + b" " * MEBI):
        limited.http.post("/v1/completions", content=body, headers=ALICE)
    assert limited.service.bodies.num_bytes == 0


CASES = {
    "truncated chat": ("/v1/chat/completions", "messages", {"truncate_prompt_tokens": 5}),
    "truncated text": ("/v1/completions", "prompt", {"truncate_prompt_tokens": 5}),
    "text": ("/v1/completions", "prompt", {}),
    "chat": ("/v1/chat/completions", "messages", {}),
    "counted": ("/tokenize", "prompt", {}),
    "counted chat": ("/tokenize", "messages", {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("text", ["q x " * 500_000, " " * (5 * MEBI)], ids=["tokens", "characters"])
def test_long_texts_are_refused_before_they_are_tokenised(limited, case, text, monkeypatch):
    path, field, more = CASES[case]
    encode, longest = limited.service.tokenizer._memo._pieces._backend.encode_batch_fast, [0]

    class Backend:
        """Notes the longest text."""

        def encode_batch_fast(self, texts, **options):
            longest[0] = max(longest[0], len(texts[0]))
            return encode(texts, **options)

    monkeypatch.setattr(limited.service.tokenizer._memo._pieces, "_backend", Backend())
    monkeypatch.setattr(limited.service.tokenizer, "backend", Backend())
    sent = [{"role": "user", "content": text}] if field == "messages" else text
    answer = limited.http.post(path, json={field: sent, **more}, headers=ALICE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded"), answer.text[:300]
    assert answer.json()["error"]["param"] == field
    assert longest[0] <= 2**17


def test_shorter_texts_are_cut_and_counted_as_before(limited):
    text = "The river flows north. " * 3000
    ids = limited.http.post("/tokenize", json={"prompt": text}, headers=ALICE).json()["tokens"]
    assert len(ids) > SMALL.max_model_len
    body = {"prompt": text, "truncate_prompt_tokens": 7, "max_tokens": 1}
    answer = limited.http.post("/v1/completions", json=body, headers=ALICE)
    assert answer.json()["usage"]["prompt_tokens"] == 7


def test_counting_in_windows_refuses_nothing_that_fits(limited, monkeypatch):
    monkeypatch.setattr(pieces, "_COUNTED", 2**16)
    monkeypatch.setattr(pieces, "_WINDOW", 2**14)
    tokenizer = limited.service.tokenizer
    text = "The river flows north, and Ünïcödé 漢字 too. " * 2600
    count = len(tokenizer.encode(text))
    assert tokenizer.encode(text, limit=count) == tokenizer.encode(text)
    with pytest.raises(ContextLengthExceeded):
        tokenizer.encode(text, limit=int(0.95 * count))


def test_a_key_has_so_many_sessions(limited):
    http = limited.http
    for number in range(5):
        assert http.post("/v1/sessions", json={"session_id": f"s{number}"}, headers=ALICE).status_code == 201
    chat = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    snapshot = http.get("/v1/sessions/s0/snapshot", headers=ALICE).content
    for method, path, body in (
        ("POST", "/v1/sessions", {"json": {"session_id": "more"}}),
        ("POST", "/v1/sessions/s0/fork", {"json": {"session_id": "more"}}),
        ("PUT", "/v1/sessions/more/snapshot", {"content": snapshot}),
        ("POST", "/v1/chat/completions", {"json": {**chat, "session_id": "more"}}),
        ("POST", "/v1/completions", {"json": {"prompt": "hi", "max_tokens": 1, "session_id": "more"}}),
        ("POST", "/v1/responses", {"json": {"input": "hi", "max_output_tokens": 1, "conversation": "more"}}),
    ):
        answer = http.request(method, path, headers=ALICE, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_sessions"), path
    assert http.post("/v1/chat/completions", json={**chat, "session_id": "s1"}, headers=ALICE).status_code == 200
    stored = http.post("/v1/responses", json={"input": "hi", "max_output_tokens": 1}, headers=ALICE)
    assert stored.status_code == 200
    assert http.post("/v1/sessions", json={"session_id": "mine"}, headers=BOB).status_code == 201
    http.delete("/v1/sessions/s0", headers=ALICE)
    assert http.post("/v1/sessions", json={"session_id": "more"}, headers=ALICE).status_code == 201
    http.delete("/v1/sessions", headers=ALICE)


def test_sessions_are_listed_in_pages(limited):
    http = limited.http
    http.delete("/v1/sessions", headers=BOB)
    for number in range(5):
        http.post("/v1/sessions", json={"session_id": f"s{number}"}, headers=BOB)
    seen, after = [], {}
    while True:
        page = http.get("/v1/sessions", params={"limit": 2, **after}, headers=BOB).json()
        seen += [item["id"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == ["s4", "s3", "s2", "s1", "s0"]
    for params, status in (
        ({"limit": 0}, 400),
        ({"limit": 5000}, 400),
        ({"after": "gone"}, 404),
        ({"after": "a b"}, 400),
    ):
        assert http.get("/v1/sessions", params=params, headers=BOB).status_code == status


def test_snapshots_are_bound_to_their_tenant(limited):
    http = limited.http
    for key in (ALICE, BOB):
        http.delete("/v1/sessions", headers=key)
    body = {"prompt": "hi", "max_tokens": 1, "session_id": "own"}
    assert http.post("/v1/completions", json=body, headers=ALICE).status_code == 200
    snapshot = http.get("/v1/sessions/own/snapshot", headers=ALICE).content
    refused = http.put("/v1/sessions/own/snapshot", content=snapshot, headers=BOB)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "snapshot_refused")
    assert "--share-snapshots" in refused.json()["error"]["message"]
    assert http.put("/v1/sessions/copy/snapshot", content=snapshot, headers=ALICE).status_code == 200
    checks = limited.service.engine.snapshots
    assert checks.check(bytearray(snapshot), trust_unsigned=False, tenant="alice")["log"]
    assert checks.check(bytearray(snapshot), trust_unsigned=False)["log"]


def status_of(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def filled(head, item, tail, size=64 * MEBI):
    return head + (item * ((size - len(head) - len(tail)) // len(item))).removesuffix(b",") + tail


TEXT = b'{"max_tokens":1,"messages":[{"role":"user","content":"'
HEAVY = {
    "letters": lambda: filled(TEXT, b"a", b'"}]}'),
    "letters and a wide one": lambda: filled(TEXT + "😀".encode(), b"a", b'"}]}'),
    "wide characters": lambda: filled(TEXT, "😀".encode(), b'"}]}'),
    "escapes": lambda: filled(TEXT, b"\\u0416", b'"}]}'),
    "messages": lambda: filled(b'{"messages":[', b'{"role":"user","content":"a"},', b"]}"),
    "numbers": lambda: filled(b'{"prompt":[', b"7,", b"]}"),
    "as many numbers as may be": lambda: filled(b'{"prompt":[', b"7777,", b"]}", 8 * MEBI),
    "16 MB of letters": lambda: filled(TEXT, "é".encode(), b'"}]}', 16 * MEBI),
    "4 MB to cut": lambda: filled(TEXT, "😀".encode(), b'"}],"truncate_prompt_tokens":1}', 4 * MEBI),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process's peak")
@pytest.mark.parametrize("name", HEAVY)
def test_a_body_costs_four_times_its_limit_at_most(limited, name):
    """Measured of this process, in which the server is; the sent body is there before."""
    body = HEAVY[name]()
    path = "/v1/completions" if b'"prompt"' in body[:20] else "/v1/chat/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {ALICE['Authorization']}\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(limited.url.rpartition(":")[2])), 60) as link:
        Path("/proc/self/clear_refs").write_text("5")
        before = status_of("VmRSS")
        sender = threading.Thread(target=lambda: (link.sendall(head.encode()), link.sendall(body)))
        sender.start()
        answer = link.recv(65536)
        sender.join()
    assert answer.split()[1] in (b"400", b"413"), answer
    assert status_of("VmHWM") - before < 4 * 64 * MEBI
