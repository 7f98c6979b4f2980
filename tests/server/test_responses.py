"""The Responses API through the real client: state, conversations, forms."""

import json

import openai
import pytest

from pacellm.config import EngineConfig
from pacellm.server.auth import Keys
from tests.server.conftest import NAME, start
from tests.server.respond import USUAL, create, post, sessions


def test_a_question_about_a_document_and_a_second_one(live, read, document):
    assert document.facts[1].answer in read.output_text
    assert (read.status, read.object, read.model) == ("completed", "response", NAME)
    assert read.usage.input_tokens_details.cached_tokens == 0
    assert read.usage.output_tokens_details.reasoning_tokens == 0
    assert read.usage.total_tokens == read.usage.input_tokens + read.usage.output_tokens
    assert read.pacellm["session"] == "new"
    second = create(live, document.facts[4].question, previous_response_id=read.id)
    assert document.facts[4].answer in second.output_text
    assert second.previous_response_id == read.id
    assert second.pacellm["session"] == "resident"
    assert second.usage.input_tokens_details.cached_tokens >= read.usage.input_tokens
    assert second.usage.input_tokens - second.usage.input_tokens_details.cached_tokens < 40


def test_an_older_response_is_forked_twice(live, read, document):
    later = create(live, document.facts[3].question, previous_response_id=read.id)
    forks = [create(live, document.facts[4].question, previous_response_id=read.id) for _ in range(2)]
    assert forks[0].output_text == forks[1].output_text
    assert forks[0].usage == forks[1].usage
    third = create(live, document.facts[4].question, previous_response_id=later.id)
    assert third.usage.input_tokens > forks[0].usage.input_tokens
    said = live.http.post("/tokenize", json={"prompt": document.facts[3].question}).json()["count"]
    assert third.usage.input_tokens >= forks[0].usage.input_tokens + said


def test_a_follow_up_is_what_the_whole_conversation_is(live, read, document):
    follow_up = create(live, document.facts[2].question, previous_response_id=read.id, store=False)
    items = [
        {"role": "user", "content": f"{document.text}\n\n{document.facts[1].question}"},
        *[item.model_dump() for item in read.output],
        {"role": "user", "content": [{"type": "input_text", "text": document.facts[2].question}]},
    ]
    whole = create(live, items, store=False, extra_body={"pacellm": {"pa": "off"}})
    assert whole.usage.input_tokens == follow_up.usage.input_tokens
    assert whole.output_text == follow_up.output_text


def test_a_conversation_is_a_session_of_that_name(clean, document):
    first = create(clean, f"{document.text}\n\n{document.facts[0].question}", conversation="talk")
    assert first.conversation.id == "talk"
    assert first.pacellm["session_id"] == "talk"
    second = create(clean, document.facts[4].question, conversation={"id": "talk"})
    assert document.facts[4].answer in second.output_text
    assert second.pacellm["session"] == "resident"
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    assert clean.http.get("/v1/sessions/talk").json()["commits"] == 2
    # a response of a conversation can be gone on from when that has gone further
    aside = create(clean, document.facts[4].question, previous_response_id=first.id)
    assert aside.output_text == second.output_text
    assert aside.usage.input_tokens_details.cached_tokens == second.usage.input_tokens_details.cached_tokens
    peek = create(clean, document.facts[4].question, conversation="talk", store=False)
    assert peek.usage.input_tokens > second.usage.input_tokens
    assert clean.http.get("/v1/sessions/talk").json()["commits"] == 2


def test_a_conversation_follows_its_session(clean):
    first = create(clean, "hello", conversation="talk")
    clean.http.post("/v1/sessions/talk/fork", json={"session_id": "copy"})
    copied, own = (create(clean, "and?", conversation=name) for name in ("copy", "talk"))
    assert copied.usage.input_tokens == own.usage.input_tokens > first.usage.input_tokens
    clean.http.post("/v1/sessions/talk/reset")
    assert create(clean, "hello", conversation="talk").usage.input_tokens == first.usage.input_tokens
    clean.http.delete("/v1/sessions/talk")
    assert create(clean, "hello", conversation="talk").pacellm["session"] == "new"
    clean.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}],
                                                  "max_tokens": 1, "session_id": "chat"})  # fmt: skip
    with pytest.raises(openai.NotFoundError) as caught:
        create(clean, "hello", conversation="chat")
    assert (caught.value.code, caught.value.param) == ("conversation_not_found", "conversation")


def test_one_response_of_a_conversation_at_a_time(clean):
    body = {**USUAL, "input": "hi", "conversation": "busy", "max_output_tokens": 20_000, "ignore_eos": True}
    with clean.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        answer = post(clean, {"conversation": "busy"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conversation_locked")
        assert answer.headers["retry-after"] == "1"
    clean.wait_until_idle()
    assert post(clean, {"conversation": "busy"}).json()["pacellm"]["session"] == "new"


def test_what_is_not_stored_leaves_nothing(clean):
    one = create(clean, "hello", store=False)
    assert one.pacellm["session"] == "none"
    assert sessions(clean) == []
    assert clean.http.get(f"/v1/responses/{one.id}").status_code == 404
    with pytest.raises(openai.NotFoundError):
        create(clean, "hello", previous_response_id=one.id)
    stored = create(clean, "hello")
    assert sessions(clean) == [stored.id]
    create(clean, "hello", previous_response_id=stored.id, store=False)
    assert sessions(clean) == [stored.id]
    assert len(clean.service.response_store) == 1
    bad = post(clean, {"previous_response_id": stored.id, "max_output_tokens": 10**8})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "max_output_tokens")
    assert "max_output_tokens" in bad.json()["error"]["message"]
    assert post(clean, {"timeout": 0.2, "max_output_tokens": 20_000, "ignore_eos": True}).status_code == 504
    clean.wait_until_idle()
    assert sessions(clean) == [stored.id]


def test_show_and_delete(clean):
    made = create(clean, "hello", metadata={"a": "b"}, instructions="Be brief.", user="me")
    shown = clean.client.responses.retrieve(made.id)
    assert shown == made
    assert (shown.metadata, shown.instructions, shown.user) == ({"a": "b"}, "Be brief.", "me")
    later = create(clean, "and?", previous_response_id=made.id)
    clean.client.responses.delete(made.id)
    for request in (
        lambda: clean.client.responses.retrieve(made.id),
        lambda: clean.client.responses.delete(made.id),
        lambda: create(clean, "x", previous_response_id=made.id),
    ):
        with pytest.raises(openai.NotFoundError):
            request()
    assert sessions(clean) == [later.id]
    assert create(clean, "and?", previous_response_id=later.id).usage.input_tokens > later.usage.input_tokens
    assert clean.http.get(f"/v1/responses/{later.id}?stream=true").json()["error"]["param"] == "stream"


def test_a_stored_responses_session_stays_as_it_was(clean):
    made = create(clean, "hello")
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "session_id": made.id}
    assert clean.http.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "session_id"
    assert clean.http.post(f"/v1/sessions/{made.id}/reset").status_code == 400
    assert clean.http.post("/v1/sessions", json={"session_id": "resp_mine"}).status_code == 400
    assert clean.http.post(f"/v1/sessions/{made.id}/fork", json={"session_id": "mine"}).status_code == 201
    assert create(clean, "and?", conversation="mine").usage.input_tokens > made.usage.input_tokens
    # its session can go without it: the messages are enough
    clean.engine.call(clean.engine.ops.delete(("default", made.id))).result(10)
    rebuilt = create(clean, "and?", previous_response_id=made.id)
    assert rebuilt.pacellm["session"] == "lost"
    assert rebuilt.usage.input_tokens > made.usage.input_tokens


def test_tenants_are_apart():
    keys = Keys({"alice-key-1": "alice", "bob-key-22": "bob"})
    with start(EngineConfig(kv_cache_memory=2**28), keys=keys) as live:
        alice, bob = (
            openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
            for key in ("alice-key-1", "bob-key-22")
        )
        made = alice.responses.create(input="hello", conversation="talk", **USUAL)
        with pytest.raises(openai.NotFoundError) as caught:
            bob.responses.create(input="hello", previous_response_id=made.id, **USUAL)
        assert caught.value.code == "previous_response_not_found"
        for request in (bob.responses.retrieve, bob.responses.delete):
            with pytest.raises(openai.NotFoundError):
                request(made.id)
        theirs = bob.responses.create(input="hello", conversation="talk", **USUAL)
        assert theirs.usage.input_tokens == made.usage.input_tokens
        assert theirs.pacellm["session"] == "new"
        assert alice.responses.retrieve(made.id) == made
        alice.close()
        bob.close()


def test_what_gives_way_is_said():
    with start(EngineConfig(kv_cache_memory=2**28), response_memory=8000) as live:
        first = create(live, "hello", conversation="talk")
        for _ in range(8):
            create(live, "hello")
        assert live.service.response_store.num_bytes <= 8000
        assert first.id not in sessions(live)
        assert post(live, {"previous_response_id": first.id}).status_code == 404
        assert post(live, {"conversation": "talk"}).json()["error"]["code"] == "conversation_not_found"
        live.http.delete("/v1/sessions/talk")
        assert post(live, {"conversation": "talk"}).status_code == 200


def test_with_a_session_directory(tmp_path):
    config = EngineConfig(kv_cache_memory=2**28, max_model_len=2**14, session_dir=tmp_path)
    with start(config) as live:
        first = create(live, "hello", conversation="talk")
        second = create(live, "and?", previous_response_id=first.id)
        assert second.pacellm["session"] == "resident"
        assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
        gone = create(live, "and?", previous_response_id=second.id)
        live.client.responses.delete(gone.id)
        create(live, "and?", conversation="talk")
        before = set(sessions(live))
        assert before == {"talk", first.id, second.id, *before}
        assert gone.id not in before
    with start(config) as live:
        assert live.http.get(f"/v1/sessions/{second.id}").json()["commits"] == 2
        assert post(live, {"previous_response_id": second.id}).status_code == 404
        assert post(live, {"conversation": "talk"}).json()["error"]["code"] == "conversation_not_found"
        live.http.delete("/v1/sessions/talk")
        assert post(live, {"conversation": "talk"}).json()["pacellm"]["session"] == "new"


def test_text_in_a_form(clean):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    made = clean.client.responses.create(
        model=NAME, input="Where?", text={"format": form}, temperature=1, max_output_tokens=60, extra_body={"seed": 3}
    )
    found = json.loads(made.output_text)
    assert set(found) == {"city", "sure"}
    assert found["city"] in ("Oslo", "Rome")
    assert (made.status, made.text.format.type) == ("completed", "json_schema")
    streamed = clean.client.responses.create(
        model=NAME, input="Where?", text={"format": form}, temperature=1, max_output_tokens=60, stream=True,
        extra_body={"seed": 3},
    )  # fmt: skip
    *_, last = streamed
    assert last.response.output_text == made.output_text
