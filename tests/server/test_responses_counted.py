"""Every HTTP answer is counted once, by status; probes and scrapes are not."""

import re
import time

BODY = {"model": "pacellm-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def counts(live):
    found = re.findall(r'^pacellm_http_responses_total\{.*status="(\d+)"\} (\S+)', live.http.get("/metrics").text, re.M)
    return {int(status): float(value) for status, value in found}


def grown(live, before, status):
    until = time.monotonic() + 5
    while counts(live)[status] == before[status] and time.monotonic() < until:
        time.sleep(0.01)
    return {key: value - before.get(key, 0) for key, value in counts(live).items() if value != before.get(key, 0)}


def test_statuses_are_there_before_they_come(live):
    assert {200, 400, 401, 404, 429, 500, 503, 504} <= set(counts(live))


def test_answers_are_counted(live):
    before = counts(live)
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert live.http.get(path).status_code == 200
    assert live.http.post("/v1/chat/completions", json=BODY).status_code == 200
    assert grown(live, before, 200) == {200: 1}
    before = counts(live)
    assert live.http.post("/v1/chat/completions", json=BODY | {"temperature": 9}).status_code == 400
    assert grown(live, before, 400) == {400: 1}
    before = counts(live)
    assert live.http.get("/nowhere/a-path-that-is-no-label").status_code == 404
    assert grown(live, before, 404) == {404: 1}
    assert "a-path-that-is-no-label" not in live.http.get("/metrics").text


def test_a_stream_is_counted_once(live):
    before = counts(live)
    with live.http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as answer:
        assert answer.read().endswith(b"[DONE]\n\n")
    assert grown(live, before, 200) == {200: 1}
