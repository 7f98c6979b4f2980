"""Deadlines, cancelling by id, idempotency, priority, and what a queued stream is told."""

import json
import threading
import time

import httpx
import openai
import pytest

from pacellm.config import EngineConfig
from pacellm.engine.forecast import Forecast
from tests.server.conftest import NAME, start

LONG = [{"role": "user", "content": "the river and the hills " * 4000}]
HI = [{"role": "user", "content": "hello"}]
ENDLESS = {"model": NAME, "messages": HI, "max_tokens": 20_000, "ignore_eos": True}


def post(live, body, **headers):
    return live.http.post("/v1/chat/completions", json=body, headers=headers)


def events(response):
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def test_a_deadline_is_an_error_that_is_not_retried(live):
    live.wait_until_idle()
    before = live.engine.allocator.num_free
    answer = post(live, {**ENDLESS, "timeout": 0.3})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    with live.http.stream("POST", "/v1/chat/completions", json={**ENDLESS, "timeout": 0.5, "stream": True}) as response:
        *_, last = events(response)
    assert last["error"]["code"] == "deadline_exceeded"
    live.wait_until_idle()
    assert live.engine.allocator.num_free == before
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none")  # with its usual two retries
    started = live.engine.stats.aborted
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(
            model=NAME, messages=HI, max_tokens=20_000, extra_body={"timeout": 0.2, "ignore_eos": True}
        )
    live.wait_until_idle()
    assert live.engine.stats.aborted == started + 1
    client.close()


def test_the_servers_own_deadline_holds_in_prefill():
    with start(request_timeout=0.2) as live:
        started = time.monotonic()
        answer = post(live, {"model": NAME, "messages": LONG * 4, "max_tokens": 1, "timeout": 600})
        assert answer.status_code == 504
        assert time.monotonic() - started < 5
        live.wait_until_idle()


@pytest.mark.parametrize("streamed", [True, False])
def test_what_would_miss_its_deadline_is_told_when_to_come_back(live, monkeypatch, streamed):
    def seconds(self, pace, own, max_tokens, load):
        return 100.0 if load.decodes else 1.0

    monkeypatch.setattr(Forecast, "seconds", seconds)
    hurried = {"model": NAME, "messages": HI, "max_tokens": 1, "timeout": 20, "stream": streamed}
    with live.http.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}) as response:
        lines = response.iter_lines()
        while "content" not in next(lines):
            pass
        with httpx.Client(base_url=live.url, timeout=30) as other:
            refused = other.post("/v1/chat/completions", json=hurried)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "deadline_out_of_reach")
            assert 79 <= int(refused.headers["retry-after"]) <= 81
            hopeless = other.post("/v1/chat/completions", json={**hurried, "timeout": 0.5})
            assert (hopeless.status_code, hopeless.headers["x-should-retry"]) == (504, "false")
            assert other.post("/v1/chat/completions", json={**hurried, "timeout": 101}).status_code == 200
    live.wait_until_idle()
    assert post(live, hurried).status_code == 200  # nobody else is there


@pytest.mark.parametrize("by", ["header", "answer"])
def test_cancel_from_another_connection(live, by):
    with live.http.stream(
        "POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}, headers={"X-Request-ID": f"cancel-{by}"}
    ) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        first = json.loads(next(lines)[6:])
        name = f"cancel-{by}" if by == "header" else first["id"]
        with httpx.Client(base_url=live.url, timeout=30) as other:
            answer = other.post(f"/v1/requests/{name}/cancel")
            assert answer.json() == {"id": name, "object": "request.cancelled", "cancelled": 1}
            *_, last = (json.loads(line[6:]) for line in lines)
            assert last["error"]["code"] == "cancelled"
            live.wait_until_idle()
            assert other.post(f"/v1/requests/{name}/cancel").status_code == 404
            assert other.post("/v1/requests/a%20b/cancel").status_code == 404


def test_an_equal_idempotency_key_returns_the_stored_answer(live):
    body = {"model": NAME, "messages": HI, "max_tokens": 8, "temperature": 1.5}
    steps = live.engine.stats.steps
    first = post(live, body, **{"Idempotency-Key": "one"})
    made = live.engine.stats.steps
    again = post(live, body, **{"Idempotency-Key": "one"})
    assert made > steps
    assert live.engine.stats.steps == made
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = post(live, {**body, "max_tokens": 7}, **{"Idempotency-Key": "one"})
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    assert post(live, body, **{"Idempotency-Key": "a b"}).status_code == 400
    streams = [post(live, {**body, "stream": True}, **{"Idempotency-Key": "two"}) for _ in range(2)]
    assert streams[0].text.replace(": keep-alive\n\n", "") == streams[1].text
    assert streams[1].headers["content-type"].startswith("text/event-stream")


def test_while_the_first_is_answered_the_second_is_told_to_wait(live):
    with live.http.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True},
                          headers={"Idempotency-Key": "slow"}) as response:  # fmt: skip
        lines = response.iter_lines()  # held: the connection closes with it
        next(lines)
        with httpx.Client(base_url=live.url, timeout=30) as other:
            answer = other.post("/v1/chat/completions", json={**ENDLESS, "stream": True},
                                headers={"Idempotency-Key": "slow"})  # fmt: skip
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "request_in_progress")
        assert answer.headers["retry-after"] == "1"
    live.wait_until_idle()  # the client left: the key is free again
    assert post(live, {**ENDLESS, "max_tokens": 2}, **{"Idempotency-Key": "slow"}).status_code == 200


def test_a_queued_stream_is_told_its_place_and_priority_goes_first():
    with start(EngineConfig(kv_cache_memory=2**28, max_num_seqs=1), progress_seconds=0.05, header_wait=0.01) as live:
        done = []

        def ask(name, **changes):
            def run():
                body = {"messages": HI, "max_tokens": 4, "stream": True, "return_progress": True, **changes}
                with (
                    httpx.Client(base_url=live.url, timeout=60) as client,
                    client.stream("POST", "/v1/chat/completions", json=body) as response,
                ):
                    seen = events(response)
                done.append((name, [one["prompt_progress"] for one in seen if "prompt_progress" in one]))

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        threads = [ask("first", max_tokens=700, ignore_eos=True)]
        while not live.engine.scheduler.running or live.service.thread.num_queued:
            time.sleep(0.01)
        for name, priority in (("usual", 0), ("late", 5), ("urgent", -5)):
            queued = live.service.thread.num_queued
            threads.append(ask(name, priority=priority))
            while live.service.thread.num_queued == queued:
                time.sleep(0.01)
        for thread in threads:
            thread.join()
    assert [name for name, _ in done] == ["first", "urgent", "usual", "late"]
    places = [one["queue"]["position"] for one in dict(done)["usual"] if "queue" in one]
    assert 2 in places  # behind the urgent one
    late = dict(done)["late"]
    assert late[0]["queue"]["position"] in (2, 3)
    assert "queue" not in late[-1]
    assert late[-1]["processed"] == late[-1]["total"]


def test_truncation_keeps_the_end_and_refuses_sessions(live):
    body = {"model": NAME, "messages": LONG, "max_tokens": 1, "truncate_prompt_tokens": 100}
    answer = post(live, body).json()
    assert answer["usage"]["prompt_tokens"] == 100
    refused = post(live, {**body, "session_id": "cut"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_the_last_message_can_be_continued(live):
    messages = [*HI, {"role": "assistant", "content": "The code is"}]
    prompts = [
        post(live, {"model": NAME, "messages": messages, "max_tokens": 1, **changes}).json()["usage"]["prompt_tokens"]
        for changes in ({}, {"continue_final_message": True}, {"add_generation_prompt": False})
    ]
    assert prompts == [prompts[1] + 2, prompts[1], prompts[1] + 1]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert post(live, {"model": NAME, "messages": messages, **both}).status_code == 400
    assert post(live, {"model": NAME, "messages": HI, "continue_final_message": True}).status_code == 400


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "enable_thinking"])
def test_template_variables_are_those_that_the_template_reads(live, name):
    answer = post(live, {"model": NAME, "messages": HI, "chat_template_kwargs": {name: "x"}})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, f"chat_template_kwargs.{name}")
    assert error["code"] == "unsupported_parameter"
