"""Clients that leave: what they held comes back, streamed or not, in prefill or in decode."""

import asyncio
import json
import threading

import httpx
import pytest

from pacellm.config import EngineConfig
from pacellm.types import GenerationRequest, SamplingParams
from tests.server.conftest import NAME, start

LONG = [{"role": "user", "content": "the river and the hills " * 4000}]
SHORT = [{"role": "user", "content": "hello"}]


def free(live):
    """Blocks and rows that no session holds; cached prefixes are idle."""
    live.engine.prefix_cache.clear()
    return live.engine.allocator.num_free, live.engine.pool.num_free


@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("streamed", [True, False])
def test_leaving_returns_everything(live, when, streamed):
    live.wait_until_idle()
    before, aborted = free(live), live.engine.stats.aborted
    messages = LONG if when == "prefill" else SHORT
    body = {"model": NAME, "messages": messages, "max_tokens": 5000, "ignore_eos": True, "stream": streamed}

    async def leave():
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            task = asyncio.create_task(client.post("/v1/chat/completions", content=json.dumps(body)))
            while not live.engine.scheduler.running:
                await asyncio.sleep(0.005)
            sequence = live.engine.scheduler.running[0]
            while when == "decode" and len(sequence.generated) < 3:
                await asyncio.sleep(0.005)
            assert not task.done()
            task.cancel()

    asyncio.run(leave())
    live.wait_until_idle()
    assert free(live) == before
    assert live.engine.stats.aborted == aborted + 1
    live.engine.parts.integrity.check()


def test_a_silent_stream_carries_keep_alive_comments(live):
    body = {"model": NAME, "messages": LONG, "max_tokens": 1, "stream": True}
    with live.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["x-pacellm-session"] in ("none", "queued")
        lines = [line for line in response.iter_lines() if line]
    assert lines[0] == ": keep-alive"
    assert lines[-1] == "data: [DONE]"


def test_the_event_loop_is_free_during_prefill(live):
    body = {"model": NAME, "messages": LONG, "max_tokens": 1}
    slow = threading.Thread(target=lambda: live.http.post("/v1/chat/completions", json=body))
    slow.start()
    with httpx.Client(base_url=live.url, timeout=5) as other:
        for _ in range(20):
            assert other.get("/health").status_code == 200
    slow.join()


def test_full_queue_says_when_to_come_back():
    config = EngineConfig(kv_cache_memory=2**28, max_num_seqs=1, max_waiting=1)
    with start(config) as live:
        endless = SamplingParams(max_tokens=30_000, temperature=0, ignore_eos=True)
        thread = live.service.thread
        thread.submit(GenerationRequest("running", [10, 11], endless))
        while thread.num_queued:
            threading.Event().wait(0.01)
        thread.submit(GenerationRequest("waiting", [10, 11], endless))
        answer = live.http.post("/v1/chat/completions", json={"model": NAME, "messages": SHORT})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"
        thread.drain()
        assert live.http.get("/ready").status_code == 503
        assert live.http.get("/health").status_code == 200
        answer = live.http.post("/v1/chat/completions", json={"model": NAME, "messages": SHORT})
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


def test_a_failure_after_the_stream_began_is_an_event(live, monkeypatch):
    from pacellm.engine import answer as answers

    def explode(*_):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(answers.Answers, "_token", explode)
    body = {"model": NAME, "messages": SHORT, "max_tokens": 3, "stream": True}
    with live.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert "broken on purpose" in json.loads(lines[-1][6:])["error"]["message"]
    answer = live.http.post("/v1/chat/completions", json={**body, "stream": False})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
    monkeypatch.undo()
    assert live.http.post("/v1/chat/completions", json={**body, "stream": False}).status_code == 200
