"""Whatever is refused, or answered again, without knowing what a body says comes before any work on the body."""

import contextlib
import json

import httpx
import pytest

from pacellm.config import EngineConfig
from pacellm.server import body as body_module
from pacellm.server.auth import Keys
from tests.server.conftest import NAME, start

HI = [{"role": "user", "content": "hello " * 4000}]  # more than is parsed on the event loop
BODIES = {
    "/v1/chat/completions": {"model": NAME, "messages": HI, "max_tokens": 1, "temperature": 1.5},
    "/v1/completions": {"model": NAME, "prompt": HI[0]["content"], "max_tokens": 1},
    "/v1/responses": {"model": NAME, "input": HI[0]["content"], "max_output_tokens": 1},
}
ENDLESS = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20_000, "ignore_eos": True, "stream": True}
KEY = {"Authorization": "Bearer order-key-1"}


@pytest.fixture(scope="module")
def server():
    config = EngineConfig(kv_cache_memory=2**29, max_model_len=32_768, max_num_seqs=1, max_waiting=1)
    with start(config, keys=Keys({"order-key-1": "a", "order-key-2": "b"}), max_body_bytes=2**20,
               max_requests_per_key=3) as server:  # fmt: skip
        yield server


@pytest.fixture
def work(server, monkeypatch):
    """What was done, in order."""
    done = []

    def noted(owner, name):
        inner = getattr(owner, name)

        def note(*arguments, **options):
            done.append(name)
            return inner(*arguments, **options)

        monkeypatch.setattr(owner, name, note)

    noted(server.service, "off_loop")
    noted(server.service, "operate")
    noted(server.service, "compile")
    noted(body_module.ReceivedBody, "parsed")
    noted(body_module, "timed_body")
    return done


@contextlib.contextmanager
def running(server, count, key="order-key-1"):
    """Streams that take all seats, and then places in the queue."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
            response = stack.enter_context(
                client.stream("POST", "/v1/chat/completions", json=ENDLESS, headers={"Authorization": f"Bearer {key}"})
            )
            assert response.status_code == 200
        yield


def post(server, path, body=None, **headers):
    content = json.dumps(BODIES[path] if body is None else body)
    return server.http.post(path, content=content, headers={**KEY, **headers})


HEADS = {
    "no key": ({"Authorization": ""}, 401),
    "wrong key": ({"Authorization": "Bearer order-key-9"}, 401),
    "another page": ({"Origin": "https://evil.test"}, 403),
    "repetition's key": ({"Idempotency-Key": "a b"}, 400),
    "session": ({"X-Session-ID": "a b"}, 400),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", HEADS)
def test_what_the_head_says_comes_before_the_body(server, work, name, path):
    headers, status = HEADS[name]
    assert post(server, path, **headers).status_code == status
    assert work == []


@pytest.mark.parametrize("path", BODIES)
def test_encoding_and_length_come_before_the_body_is_parsed(server, work, path):
    assert post(server, path, **{"Content-Encoding": "br"}).status_code == 415
    assert server.http.post(path, content=b" " * (2**20 + 1), headers=KEY).status_code == 413
    assert work == ["timed_body"] * 2


@pytest.mark.parametrize("path", BODIES)
def test_a_repetition_is_told_before_the_body_is_parsed(server, work, path):
    key = {"Idempotency-Key": f"order{path}"}
    first = post(server, path, **key)
    assert first.status_code == 200
    assert "parsed" in work
    work.clear()
    again = post(server, path, **key)
    assert (again.status_code, again.content) == (200, first.content)
    other = post(server, path, {**BODIES[path], "seed": 1}, **key)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    assert work == ["timed_body"] * 2


def test_a_body_that_is_refused_leaves_the_key_free(server):
    for path in BODIES:
        key = {"Idempotency-Key": f"free{path}"}
        for body in ({"seed": "x"}, {**BODIES[path], "model": "gpt-9"}):
            assert post(server, path, body, **key).status_code in (400, 404)
        assert post(server, path, **key).status_code == 200


def test_while_the_first_runs_and_the_queue_is_full_a_repetition_is_told_at_once(server, work):
    path = "/v1/chat/completions"
    stored = post(server, path, **{"Idempotency-Key": "stored"})
    headers = {**KEY, "Idempotency-Key": "runs"}
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", path, json=ENDLESS, headers=headers),
        running(server, 1, "order-key-2"),
    ):
        work.clear()
        content = client.build_request("POST", path, json=ENDLESS).content
        conflict = server.http.post(path, content=content, headers=headers)
        assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "request_in_progress")
        again = post(server, path, **{"Idempotency-Key": "stored"})
        assert again.content == stored.content
        assert work == ["timed_body"] * 2
    server.wait_until_idle()


@pytest.mark.parametrize("path", BODIES)
def test_a_full_queue_and_a_keys_limit_come_before_the_body_is_parsed(server, work, path):
    with running(server, 2, "order-key-2"):  # a seat and the only place in the queue
        work.clear()
        full = post(server, path)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert work == ["timed_body"]
    server.wait_until_idle()
    server.service._generations.update({str(number): _Asked("a") for number in range(3)})
    try:
        work.clear()
        limited = post(server, path)
        assert (limited.status_code, limited.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert work == ["timed_body"]
    finally:
        for number in range(3):
            del server.service._generations[str(number)]
    assert post(server, path).status_code == 200


class _Asked:
    """A running request of a tenant."""

    def __init__(self, tenant):
        self.caller = self
        self.tenant = tenant


def test_a_server_that_ends_says_so_before_the_body_is_parsed(server, work, monkeypatch):
    monkeypatch.setattr(server.service.thread, "_draining", True)
    for path in BODIES:
        work.clear()
        answer = post(server, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert work == ["timed_body"]


def test_another_model_is_told_before_anything_is_rendered(server, work):
    for path in BODIES:
        work.clear()
        answer = post(server, path, {**BODIES[path], "model": "gpt-9"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert work == ["timed_body", "parsed", "off_loop"]  # the last one parses
