"""Malformed requests over raw sockets: each gets a 4xx in time, or its connection is closed where it is no HTTP."""

import json
import re
import socket

import pytest

from pacellm.config import EngineConfig
from pacellm.server.api.chat.schema import ChatCompletionRequest
from pacellm.server.api.completions.schema import CompletionRequest
from pacellm.server.api.responses.schema import ResponseRequest
from pacellm.server.api.sessions.schema import NamedSession
from pacellm.server.api.tokens.schema import DetokenizeRequest, TokenizeRequest
from tests.server.conftest import start

SECONDS = 5.0  # for each case
HI = [{"role": "user", "content": "hi"}]
# every endpoint with a JSON body: what checks it, and a body that is right
ENDPOINTS = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": HI, "max_tokens": 1}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi", "max_tokens": 1}),
    "/v1/responses": (ResponseRequest, {"input": "hi", "max_output_tokens": 1, "store": False}),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [65]}),
    "/v1/sessions": (NamedSession, {"session_id": "malformed"}),
}
NO_FIELD_TAKES = ["[[[]]]", '{"x":[[]]}', "1e999", "9" * 5000, "NaN", "-Infinity", '"\\ud800"']
NO_JSON = [
    b"", b" ", b"{", b"}", b"[", b"null", b"true", b"5", b'"x"', b"[]", b"[{}]", b"nul", b"{]", b"{,}", b"{'a':1}",
    b"{a:1}", b'{"a"}', b'{"a":}', b'{"a":1,}', b'{"a" 1}', b"\x00", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}{}", b"{} x",
    b"// x\n{}", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"1" * 100_000,
    b'{"a":01}', b'{"a":+1}', b'{"a":.5}', b'{"a":1.}', b'{"a":0x10}', b'{"a":1e}', b'{"a":"\n"}', b'{"a":"\\x"}',
    b'{"a":"\\u12"}', b'{"\xff":1}', b'{"\\ud800":1}', "{}".encode("utf-16"), "{}".encode("utf-32"),
]  # fmt: skip


@pytest.fixture(scope="module")
def impatient():
    """A server that waits for a head, and for a body, for half a second."""
    config = EngineConfig(kv_cache_memory=2**28, max_model_len=4096)
    with start(config, body_seconds=0.5, head_seconds=0.5, max_body_bytes=2**20) as server:
        yield server


class Wire:
    """A connection to a server, opened again whenever it was closed."""

    def __init__(self, live):
        self._address = ("127.0.0.1", int(live.url.rpartition(":")[2]))
        self._socket = None

    def ask(self, raw, *, hang_up=False):
        """The status that raw bytes get, None where the connection is closed; fails after ``SECONDS``."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, SECONDS)
        try:
            self._socket.sendall(raw)
            if hang_up:
                self._socket.shutdown(socket.SHUT_WR)
            return self._read()
        except TimeoutError:
            raise
        except OSError:
            self.close()
            return None

    def _read(self):
        data = b""
        while True:
            head, end, rest = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            if end and (length is None or len(rest) >= int(length[1])):
                break
            part = self._socket.recv(65536)
            if not part:
                self.close()
                return int(data.split()[1]) if data else None
            data += part
        if re.search(rb"(?i)connection: close", head):
            self.close()
        status = int(head.split()[1])
        if b"application/json" in head:
            assert set(json.loads(rest[: int(length[1])])["error"]) == {"message", "type", "param", "code"}
        return status

    def post(self, path, body):
        """The status of a well-formed request with this body."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return self.ask(head.encode() + body)

    def close(self):
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@pytest.fixture
def wire(impatient, caplog):
    connection = Wire(impatient)
    yield connection
    connection.close()
    assert not [record for record in caplog.get_records("call") if record.levelname in ("ERROR", "CRITICAL")]
    assert impatient.http.get("/health").status_code == 200
    impatient.wait_until_idle()


def refused(status):
    return status is not None and 400 <= status < 500


@pytest.mark.parametrize("path", ENDPOINTS)
def test_wrong_values_for_every_field(wire, path):
    kind, right = ENDPOINTS[path]
    for name in kind.model_fields:
        others = {key: value for key, value in right.items() if key != name}
        for wrong in NO_FIELD_TAKES:
            body = f"{json.dumps(others)[:-1]}{', ' if others else ''}{json.dumps(name)}: {wrong}}}"
            assert refused(status := wire.post(path, body.encode())), (name, wrong[:20], status)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_no_json_object(wire, path):
    for body in NO_JSON:
        if path == "/v1/sessions" and not body.strip():
            continue  # as good as an empty object there
        assert refused(status := wire.post(path, body)), (body[:40], status)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_cut_short_at_every_byte(wire, path):
    whole = json.dumps(ENDPOINTS[path][1]).encode()
    for length in range(1, len(whole)):
        assert refused(status := wire.post(path, whole[:length])), (whole[:length], status)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_keys_twice_and_keys_unknown(wire, path):
    _, right = ENDPOINTS[path]
    inside = json.dumps(right)[1:-1]
    for name, value in right.items():
        twice = f"{{{inside}, {json.dumps(name)}: {json.dumps(value)}}}"
        assert refused(status := wire.post(path, twice.encode())), (twice, status)
    for name in ("", "x" * 5000, "__proto__", "a\\u0000b", "é"):
        body = f'{{{inside}, "{name}": 1}}'
        assert refused(status := wire.post(path, body.encode())), (body[:60], status)
    nested = '{"messages": [{"role": "user", "role": "user", "content": "hi"}], "max_tokens": 1}'
    assert refused(wire.post("/v1/chat/completions", nested.encode()))


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
BROKEN = [
    b"\r\n\r\n",
    b"\x00\x01\x02\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1 x\r\n\r\n",
    b"GET  / HTTP/1.1\r\n\r\n",
    b"G\xe4T / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.0\r\n\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"x" * 200_000,
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"No colon\r\n\r\n",
    HEAD + b": empty\r\n\r\n",
    HEAD + b"A b: c\r\n\r\n",
    HEAD + b"A : c\r\n\r\n",
    HEAD + b"A: \x00\r\n\r\n",
    HEAD + b"A: b\r\n c\r\n\r\n",
    HEAD + b"\xff: b\r\n\r\n",
    HEAD + b"Host: y\r\n\r\n",
    HEAD + b"A: " + b"b" * 200_000 + b"\r\n\r\n",
    HEAD + b"A: b\r\n" * 5000 + b"\r\n",
    HEAD + b"A: b\r\n" * 200 + b"\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: x\r\n\r\n",
    HEAD + b"Content-Length: 1e3\r\n\r\n",
    HEAD + b"Content-Length: \r\n\r\n",
    HEAD + b"Content-Length: 2, 3\r\n\r\n{}",
    HEAD + b"Content-Length: +2\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    HEAD + b"Content-Length: 99999999999\r\n\r\n",
    HEAD + b"Content-Length: 0\r\n\r\n",
    HEAD + b"\r\n",
    HEAD + b"Content-Length: 1\r\n\r\n{}{}{}",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}{}\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"a" * 200_000 + b"\r\n{}\r\n0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\nHost: x\n\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: b\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: b\r\n c: d\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: b\r\n\tc\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"A: bbbbbbbbbbbbbbbb\r\n" * 4000 + b"\r\n",
    b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: b\r\n c\r\n\r\n",
    HEAD + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    HEAD + b"X-Session-ID: \xff\r\n\r\n",
    HEAD + b"Authorization: \xff\r\n\r\n",
]
UNFINISHED = [
    b"POST",
    b"POST /v1/chat/completions HTTP/1.1\r\n",
    HEAD,
    HEAD + b"Content-Len",
    HEAD + b"Content-Length: 50\r\n\r\n",
    HEAD + b'Content-Length: 50\r\n\r\n{"messages"',
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_what_is_no_http(wire, number):
    status = wire.ask(BROKEN[number], hang_up=True)
    assert status is None or refused(status), (BROKEN[number][:80], status)


@pytest.mark.parametrize("number", range(len(UNFINISHED)))
@pytest.mark.parametrize("hangs_up", [True, False])
def test_what_never_ends(wire, number, hangs_up):
    raw = UNFINISHED[number]
    status = wire.ask(raw, hang_up=hangs_up)
    assert status is None or refused(status), status
    assert hangs_up or status == 408


@pytest.mark.parametrize("path", ["/v1/responses/", "/v1/sessions/", "/v1/models/", "/v1/requests/"])
def test_odd_paths_and_queries(wire, path):
    for name in (
        "%00",
        "%ff",
        "%2e%2e%2fx",
        "a%20b",
        "x" * 3000,
        "%",
        "%zz",
        ";",
        "a?b=%ff",
        "a?kv=maybe",
        "a?=&&=",
        "é",
    ):
        raw = f"GET {path}{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        status = wire.ask(raw)
        assert status is None or refused(status), (name[:40], status)
    for number in range(40):
        raw = f"GET {path}{number * '%2f'}/..;/{number * 'é'}?kv={number} HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1")
        status = wire.ask(raw)
        assert status is None or refused(status), (number, status)


def test_there_are_enough_cases():
    values = sum(len(kind.model_fields) for kind, _ in ENDPOINTS.values()) * len(NO_FIELD_TAKES)
    assert values + len(NO_JSON) * len(ENDPOINTS) + len(BROKEN) + 2 * len(UNFINISHED) > 500
