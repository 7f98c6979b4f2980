"""A client that goes when the engine has already committed: the conversation has the turn that its session has."""

import threading

import httpx
import pytest

from pacellm.types import Finished
from tests.server.conftest import NAME, start

FACT = "The access code of the amber archive is 48213."
BODY = {"model": NAME, "temperature": 0, "max_output_tokens": 1, "input": FACT}


class Held:
    """Holds the end of every response back, once the engine has committed it.

    Attributes:
        has_come: one is held. may_go: what it waits for.
    """

    def __init__(self, live):
        self.has_come, self.may_go = threading.Event(), threading.Event()
        self._thread, self._deliver = live.service.thread, live.service.thread._deliver
        self._thread._deliver = self._hold

    def _hold(self, events):
        ends = [(name, event) for name, event in events if isinstance(event, Finished) and name.startswith("resp_")]
        self._deliver([one for one in events if one not in ends])
        if ends:
            self.has_come.set()
            assert self.may_go.wait(30)
            self._deliver(ends)

    def release(self):
        self.may_go.set()
        self._thread._deliver = self._deliver


def leave(live, held, body):
    """A client that reads what there is, and goes before the end is told."""
    with httpx.stream("POST", f"{live.url}/v1/responses", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if "response.output_text.delta" in line or "response.in_progress" in line:
                break
        assert held.has_come.wait(30)


def turn(live, conversation, text):
    found = live.http.post("/v1/responses", json={**BODY, "input": text, "conversation": conversation})
    assert found.status_code == 200, found.text
    return found.json()


def wait_until_free(live):
    for _ in range(500):
        if not live.service.conversations and not live.service._generations:
            return
        threading.Event().wait(0.02)
    raise AssertionError("the conversation is still being worked on")


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_turn_whose_client_has_left_is_in_the_conversation(earlier):
    with start() as live:
        for name in ("left", "stayed"):
            for number in range(earlier):
                turn(live, name, f"{FACT} {number}")
        turn(live, "stayed", FACT)
        held = Held(live)
        leave(live, held, {**BODY, "conversation": "left", "stream": True})
        threading.Event().wait(0.2)  # the server sees that the client has gone
        held.release()
        wait_until_free(live)
        found, expected = turn(live, "left", "What is it?"), turn(live, "stayed", "What is it?")
        assert found["usage"]["input_tokens"] == expected["usage"]["input_tokens"]
        assert found["output"][0]["content"] == expected["output"][0]["content"]
        sessions = {one["id"]: (one["tokens"], one["commits"]) for one in live.sessions()}
        assert sessions["left"] == sessions["stayed"]


def test_a_turn_that_is_cancelled_in_time_leaves_nothing():
    with start() as live:
        turn(live, "c", FACT)
        before = {one["id"]: (one["tokens"], one["commits"]) for one in live.sessions()}
        body = {**BODY, "conversation": "c", "stream": True, "max_output_tokens": 400, "input": "Tell me more."}
        with httpx.stream("POST", f"{live.url}/v1/responses", json=body, timeout=60) as answer:
            next(line for line in answer.iter_lines() if "response.in_progress" in line)
        wait_until_free(live)
        live.wait_until_idle()
        assert {one["id"]: (one["tokens"], one["commits"]) for one in live.sessions()} == before
        assert turn(live, "c", "What is it?")["status"] in ("completed", "incomplete")
