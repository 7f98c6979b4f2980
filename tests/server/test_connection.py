"""Connections: how long they may wait, how many there may be, and what the log says of a flood."""

import contextlib
import io
import json
import logging
import resource
import socket
import time

import pytest

from pacellm.config import EngineConfig
from pacellm.server import connection, logs
from tests.server.conftest import start

SMALL = EngineConfig(kv_cache_memory=2**28, max_model_len=4096)
HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
MOST = 6


@pytest.fixture(scope="module")
def narrow():
    """A server for few connections, which waits for a head for less than a second."""
    with start(SMALL, head_seconds=0.6, stall_seconds=0.5, max_connections=MOST) as server:
        yield server


def connect(live):
    return socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), 10)


def rest(link):
    """All that still comes; b"" where the connection was reset."""
    data = b""
    try:
        while part := link.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


@pytest.mark.parametrize("begun", [b"", b"GET", HEAD])
def test_a_head_has_its_time(narrow, begun):
    with connect(narrow) as link:
        link.sendall(begun)
        answer = rest(link)
    assert answer.startswith(b"HTTP/1.1 408") if begun else answer == b""


def test_bytes_one_by_one_win_no_time(narrow):
    started = time.monotonic()
    with connect(narrow) as link, contextlib.suppress(OSError):
        while time.monotonic() < started + 10:
            link.sendall(b"G")
            time.sleep(0.05)
    assert time.monotonic() - started < 5


def test_an_idle_connection_goes_after_its_answer(narrow):
    with connect(narrow) as link:
        link.sendall(HEAD + b"\r\n")
        assert rest(link).count(b"HTTP/1.1 200") == 1


def test_an_answer_takes_the_time_it_takes(narrow):
    body = json.dumps({"prompt": "a", "max_tokens": 120, "ignore_eos": True, "stream": True, "temperature": 0})
    with narrow.http.stream("POST", "/v1/completions", content=body) as answer:
        lines = [(time.sleep(0.004), line)[1] for line in answer.iter_lines()]
    assert lines[-2:] == ["data: [DONE]", ""]


def test_silent_connections_do_not_shut_others_out(narrow):
    silent = [connect(narrow) for _ in range(3 * MOST)]
    try:
        with connect(narrow) as link:
            link.sendall(HEAD + b"Connection: close\r\n\r\n")
            assert rest(link).startswith(b"HTTP/1.1 200")
        assert narrow.limits.turned_away
        assert len(narrow.limits.idle) <= MOST
    finally:
        for link in silent:
            link.close()


def test_more_than_can_be_answered_are_turned_away(narrow):
    body = json.dumps({"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    links = []
    try:
        for _ in range(MOST):
            links.append(connect(narrow))
            links[-1].sendall(head + body)
            assert links[-1].recv(10).startswith(b"HTTP/1.1 2")
        with connect(narrow) as link:
            assert rest(link) == b""
    finally:
        for link in links:
            link.close()
    narrow.wait_until_idle()
    assert narrow.http.get("/health").status_code == 200


def test_who_takes_nothing_is_given_up(narrow):
    before, ask = narrow.limits.late, b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connect(narrow) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.sendall(200 * ask)  # megabytes of answers
        deadline = time.monotonic() + 20
        while narrow.limits.late == before and time.monotonic() < deadline:
            time.sleep(0.05)
    assert narrow.limits.late > before


def test_descriptors_bound_connections(monkeypatch, caplog):
    limits = [[64, 64]]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits[0]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(0, list(new)))
    most, batch = connection.room_for(1024)
    assert most + connection._BATCHES * batch <= 32
    assert most >= 8
    assert "ulimit" in caplog.text
    limits[0] = [256, 1_000_000]
    most, batch = connection.room_for(1024)
    assert most == 1024
    assert limits[0][0] >= most + connection._BATCHES * batch


def test_lines_that_repeat_are_counted():
    stream = io.StringIO()
    handler = logs.CountingHandler(stream, most=3, seconds=1e9)
    log = logging.Logger("flood")
    log.addHandler(handler)
    for number in range(1000):
        log.warning("connection %d was closed", number)
    log.error("something else")
    for _ in range(5):
        handler.handle(logging.LogRecord("pacellm.access", logging.INFO, "", 0, "GET", None, None))
    handler.close()
    lines = stream.getvalue().splitlines()
    assert lines[:4] == [f"connection {n} was closed" for n in range(3)] + ["something else"]
    assert lines[4:9] == ["GET"] * 5
    assert len(lines) == 10
    assert "997 more lines like 'connection %d was closed'" in lines[9]


def test_a_stream_that_the_end_cuts_says_so():
    with start(SMALL, shutdown_timeout=0) as server:
        body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert server.http.get("/ready").status_code == 200
            server.end()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert server.service.thread.is_draining
