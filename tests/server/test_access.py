"""Who gets in, what the edge lets through, and what the log says."""

import json
import logging
import re
import socket
import time

import openai
import pytest

from pacellm.cli.main import serve_options
from pacellm.cli.serve import server_settings
from pacellm.config import EngineConfig
from pacellm.errors import ConfigError
from pacellm.server import logs
from pacellm.server.api import routers
from pacellm.server.auth import Keys, read_keys
from tests.server.conftest import NAME, start

ALICE, ALICE_NEW, BOB = "alice-key-1", "alice-key-2", "bob-key-22"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# tenants\n\nalice: {ALICE}\nalice:{ALICE_NEW}\nbob: {BOB}\n")
    with start(keys=read_keys([], file), allowed_hosts=("127.0.0.1", "*.example.org"), admin_port=1,
               cors_origins=("https://app.example.org",), max_requests_per_key=1) as server:  # fmt: skip
        yield server


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def ask(live, key, **changes):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:
        return client.chat.completions.create(model=NAME, messages=HI, max_tokens=2, **changes)


@pytest.mark.parametrize(
    "header", [{}, bearer("wrong-key-1"), {"Authorization": "Bearer"}, {"Authorization": ALICE}, bearer("é")]
)
def test_no_key_no_answer(guarded, header):
    header = {name: value.encode() for name, value in header.items()}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/version")):
        answer = guarded.http.request(method, path, headers=header)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_only_health_is_public():
    """That all others want a key is asked in test_contract.py."""
    assert {route.path for route in routers.public.routes} == {"/health", "/ready"}


def test_health_needs_no_key_and_metrics_are_elsewhere(guarded):
    assert guarded.http.get("/health").status_code == 200
    assert guarded.http.get("/ready").status_code == 200
    assert guarded.http.get("/metrics", headers=bearer(ALICE)).status_code == 404


def test_sessions_belong_to_the_tenant_not_to_the_key(guarded):
    def found(key):
        return ask(guarded, key, extra_body={"session_id": "mine"}).pacellm["session"]

    assert found(ALICE) == "new"
    assert found(BOB) == "new"
    assert found(ALICE_NEW) == "resident"
    assert guarded.engine.sessions.get(("alice", "mine")) is not None
    with pytest.raises(openai.AuthenticationError):
        found("some-other-key")


def test_session_routes_know_the_tenant(guarded):
    ask(guarded, ALICE, extra_body={"session_id": "theirs"})
    http = guarded.http
    assert http.get("/v1/sessions").status_code == 401
    assert http.delete("/v1/sessions").status_code == 401
    listed = {key: [item["id"] for item in http.get("/v1/sessions", headers=bearer(key)).json()["data"]]
              for key in (ALICE, ALICE_NEW, BOB)}  # fmt: skip
    assert "theirs" in listed[ALICE]
    assert listed[ALICE_NEW] == listed[ALICE]
    assert "theirs" not in listed[BOB]
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/reset"), ("POST", "/fork"), ("GET", "/snapshot")):
        answer = http.request(method, f"/v1/sessions/theirs{path}", headers=bearer(BOB))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "session_not_found")
    http.delete("/v1/sessions", headers=bearer(BOB))
    assert http.get("/v1/sessions/theirs", headers=bearer(ALICE_NEW)).status_code == 200


def test_a_key_has_its_limit(guarded):
    body = {"messages": HI, "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    with guarded.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
        lines = response.iter_lines()
        next(lines)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(guarded, ALICE)
        assert caught.value.code == "rate_limit_exceeded"
        ask(guarded, BOB)
    guarded.wait_until_idle()


HOSTS = {
    "evil.test": 400, "127.0.0.1.evil.test": 400, "a.example.org": 200, "A.Example.org.:80": 200, "example.org": 400,
    "127.0.0.1:1": 200, "10.1.2.3:8000": 200, "[::1]:8000": 200, "0x7f000001": 400, "": 400,
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_hosts(guarded, host):
    answer = guarded.http.get("/version", headers={"Host": host, **bearer(ALICE)})
    assert answer.status_code == HOSTS[host], answer.text
    for path in ("/health", "/ready"):
        assert guarded.http.get(path, headers={"Host": host}).status_code == 200


FOREIGN = [
    {"Origin": "https://evil.test"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Origin": "null"},
]
CHANGES = [
    ("POST", "/v1/sessions/mine/reset"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/requests/x/cancel"),
    ("DELETE", "/v1/sessions"),
    ("GET", "/v1/sessions/mine"),
    ("GET", "/v1/models"),
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_origins_change_and_read_nothing(clean, headers):
    clean.http.post("/v1/sessions", json={"session_id": "mine"})
    before = clean.sessions()
    for method, path in CHANGES:
        plain = {"Content-Type": "text/plain"} if method == "POST" else {}
        answer = clean.http.request(method, path, headers={**headers, **plain})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert clean.sessions() == before
    for path in ("/health", "/ready", "/metrics"):
        assert clean.http.get(path, headers=headers).status_code == 200


def test_what_is_no_foreign_page_is_let_in(clean, guarded):
    own = clean.url.partition("://")[2]
    for headers in (
        {"Content-Type": "application/x-www-form-urlencoded"},  # curl -d
        {"Origin": clean.url},
        {"Origin": f"https://{own}"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
        {"Sec-Fetch-Site": "none"},
    ):
        answer = clean.http.post("/tokenize", content=b'{"prompt": "hi"}', headers=headers)
        assert answer.status_code == 200, headers
    listed = {"Origin": "https://app.example.org", "Sec-Fetch-Site": "cross-site", **bearer(ALICE)}
    assert guarded.http.post("/tokenize", content=b'{"prompt": "hi"}', headers=listed).status_code == 200


def test_without_keys_only_names_of_this_machine_are_served():
    for host in ("127.0.0.1", "0.0.0.0"):
        options = serve_options(["--host", host, "--allowed-host", "pacellm"])
        hosts = server_settings(options, NAME, Keys({})).allowed_hosts
        assert {"pacellm", "localhost", "127.0.0.1", socket.gethostname()} <= set(hosts)
    assert server_settings(serve_options([]), NAME, Keys({ALICE: "alice"})).allowed_hosts == ()


def test_metrics_can_be_one_tenants():
    keys = Keys({ALICE: "alice", BOB: "prometheus"})
    settings = server_settings(serve_options(["--metrics-tenant", "prometheus"]), NAME, keys)
    with pytest.raises(ConfigError):
        server_settings(serve_options(["--metrics-tenant", "nobody"]), NAME, keys)
    with start(EngineConfig(kv_cache_memory=2**28, max_model_len=128), keys=keys,
               metrics_tenant=settings.metrics_tenant) as server:  # fmt: skip
        refused = server.http.get("/metrics", headers=bearer(ALICE))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert server.http.get("/metrics", headers=bearer(BOB)).status_code == 200
        assert server.http.get("/metrics").status_code == 401


def test_cors_only_for_the_listed_origin(guarded, live):
    listed, other = "https://app.example.org", "https://evil.test"
    for server, origin, allowed in ((guarded, listed, listed), (guarded, other, None), (live, listed, None)):
        answer = server.http.get("/health", headers={"Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_request_ids_go_in_and_out(live):
    assert live.http.get("/health", headers={"X-Request-ID": "abc.1"}).headers["x-request-id"] == "abc.1"
    assert len(live.http.get("/v1/nothing").headers["x-request-id"]) == 32
    many = live.http.get("/health", headers=[(f"x-{number}", "1") for number in range(200)])
    assert (many.status_code, many.json()["error"]["code"]) == (400, "too_many_headers")


@pytest.mark.parametrize("odd", [b"a b", b"", b"x" * 129, "é".encode(), b"\xff", b"a\tb", b"\x01", b"a/b", b"x" * 5000])
def test_odd_request_ids_are_replaced(live, odd):
    for path, status in (("/health", 200), ("/v1/nothing", 404)):
        answer = live.http.get(path, headers={"X-Request-ID": odd})
        assert answer.status_code == status
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_the_log_has_ids_and_no_content(live, caplog):
    with caplog.at_level(logging.DEBUG):
        for content in ("secretword", 5, "\ud800secretword"):
            messages = [{"role": "user", "content": content}]
            live.http.post(
                "/v1/chat/completions?q=secretword",
                content=json.dumps({"messages": messages, "max_tokens": 1, "stop": "secretword"}),
                headers={"X-Request-ID": "logged", **bearer("secretkey")},
            )
    records = [record for record in caplog.records if not record.name.startswith("http")]  # the client's own log
    lines = [record for record in records if record.name == "pacellm.access" and record.fields["method"] == "POST"]
    assert lines[0].fields["route"] == "/v1/chat/completions"
    assert lines[0].fields["status"] == 200
    token = logs.request_id.set("logged")
    shown = [logs.JsonFormatter().format(record) for record in records]
    logs.request_id.reset(token)
    assert all(json.loads(line)["request_id"] == "logged" for line in shown)
    assert not any(word in line for line in shown for word in ("secretword", "secretkey"))


def routes_of(caplog, level=logging.INFO):
    found = [one for one in caplog.records if one.name == "pacellm.access" and one.levelno >= level]
    return [(one.fields["method"], one.fields["route"], one.fields["status"]) for one in found]


def test_the_log_names_routes_and_what_has_none(live, caplog):
    with caplog.at_level(logging.DEBUG):
        live.http.get("/v1/sessions/secretname", headers={"Host": "evil.example", "Origin": "https://evil.example"})
        live.http.get("/v1/sessions/secretname")
        live.http.options("/v1/sessions/secretname")
        live.http.get("/no/such%0aline?q=secretname")
        live.http.get(f"/{'x' * 5000}")
        live.http.get("/health")  # a line is written after its answer
    *known, none, long = routes_of(caplog)
    assert [route for _, route, _ in known] == ["/v1/sessions/{name}"] * 3
    assert none == ("GET", "/no/such%0Aline", 404)
    assert long == ("GET", "/" + "x" * 99, 404)


def test_probes_and_scrapes_are_quiet(live, caplog):
    with caplog.at_level(logging.DEBUG):
        for path in ("/health", "/ready", "/metrics", "/version"):
            live.http.get(path)
        live.http.post("/health")
        until = time.monotonic() + 5  # a line is written after its answer
        while len(routes_of(caplog, logging.DEBUG)) < 5 and time.monotonic() < until:
            time.sleep(0.01)
    assert routes_of(caplog) == [("POST", "/health", 405)]
    assert len(routes_of(caplog, logging.DEBUG)) == 5


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    for content in ("no colon here", "alice:", ": key12345", "alice: short", "alice: two words here"):
        file.write_text(content)
        with pytest.raises(ConfigError) as caught:
            read_keys([], file)
        assert "two words" not in str(caught.value)
    with pytest.raises(ConfigError):
        read_keys([], tmp_path / "absent")
    first, second = (read_keys(["key-number-1", "key-number-2"], None).tenant(f"key-number-{n}") for n in (1, 2))
    assert first != second
    assert not Keys({})
