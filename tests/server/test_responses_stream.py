"""Responses as events."""

import json

from tests.server.respond import USUAL, post, raw_events, sessions


def test_the_stream_folds_to_the_whole_response(live, read, document):
    body = {"input": document.facts[2].question, "previous_response_id": read.id, **USUAL}
    whole = live.client.responses.create(**body)
    with live.client.responses.stream(**body) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert events[-1].response.id == events[0].response.id
    assert events[0].response.status == "in_progress"
    assert live.client.responses.retrieve(final.id).output_text == whole.output_text


def test_progress_length_and_failure_in_a_stream(live, document):
    body = {**USUAL, "input": document.text, "stream": True, "store": False, "return_progress": True,
            "max_output_tokens": 2, "ignore_eos": True}  # fmt: skip
    with live.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.headers["x-pacellm-session"] == "none"
        events = raw_events(response)
    progress = [one["prompt_progress"] for one in events if one["type"] == "pacellm.prompt_progress"]
    assert progress[-1]["processed"] == progress[-1]["total"] > 1000
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"
    late = {**body, "input": "hi", "max_output_tokens": 20_000, "timeout": 1.5}
    with live.http.stream("POST", "/v1/responses", json=late) as response:
        *_, last = raw_events(response)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "deadline_exceeded"
    live.wait_until_idle()


def test_a_client_that_leaves_cancels(clean):
    body = {**USUAL, "input": "hi", "stream": True, "max_output_tokens": 20_000, "ignore_eos": True}
    with clean.http.stream("POST", "/v1/responses", json=body) as response:
        lines = response.iter_lines()
        next(line for line in lines if "output_text.delta" in line)
    clean.wait_until_idle()
    assert sessions(clean) == []
    assert len(clean.service.response_store) == 0


def test_cancel_by_id_and_idempotency(clean):
    body = {**USUAL, "input": "hi", "stream": True, "max_output_tokens": 20_000, "ignore_eos": True}
    with clean.http.stream("POST", "/v1/responses", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        name = json.loads(next(lines)[6:])["response"]["id"]
        assert clean.http.post(f"/v1/requests/{name}/cancel").json()["cancelled"] == 1
        *_, last = lines
    assert json.loads(last[6:])["response"]["error"]["code"] == "cancelled"
    for stream in (False, True):
        first, again = (post(clean, {"stream": stream}, **{"Idempotency-Key": f"r{stream}"}) for _ in range(2))
        assert again.headers["idempotent-replayed"] == "true"
        assert first.text.replace(": keep-alive\n\n", "") == again.text
