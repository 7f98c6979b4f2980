"""Tools in the Responses API, through the real client."""

import json

import pytest

from tests.server.conftest import NAME, start
from tests.server.respond import USUAL, create, post, raw_events
from tests.server.talk import DICE, HERMES, PARAMETERS, WEATHER, check

TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, DICE)]
CALLING = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 150}


def called(response):
    return [(item.name, item.arguments) for item in response.output if item.type == "function_call"]


def test_a_call_its_result_and_the_answer(clean):
    first = create(clean, "How is the weather?", **CALLING, extra_body={"seed": 1})
    (item,) = first.output
    assert (item.type, item.status, first.status) == ("function_call", "completed", "completed")
    assert item.call_id.startswith("call_")
    assert item.id.startswith("fc_")
    check(called(first))
    assert [tool.name for tool in first.tools] == list(PARAMETERS)
    assert first.tool_choice == "required"
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    second = create(clean, [result], previous_response_id=first.id, tools=TOOLS, tool_choice="none")
    assert second.pacellm["session"] == "resident"
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    assert [one.type for one in second.output] == ["message"]
    # the same, with the history sent along: as it came, and as a client dumps it
    question = {"role": "user", "content": "How is the weather?"}
    for sent in (item.to_dict(), item.model_dump()):
        whole = create(clean, [question, sent, result], tools=TOOLS, tool_choice="none", store=False)
        assert whole.usage.input_tokens == second.usage.input_tokens
        assert whole.output_text == second.output_text
    lost = [{**result, "call_id": "call_other"}]
    answer = post(clean, {"input": lost, "previous_response_id": first.id})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


def test_several_calls_and_a_named_one(clean):
    body = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 100, "temperature": 1}
    counts = set()
    for seed in (1, 2):
        made = create(clean, "Weather?", **body, extra_body={"seed": seed})
        calls = called(made)
        assert len({item.id for item in made.output}) == len(made.output)
        check(calls if made.status == "completed" else calls[:-1])
        counts.add(len(calls))
    assert max(counts) > 1
    named = create(clean, "Roll.", tools=TOOLS, tool_choice={"type": "function", "name": "roll-dice"})
    assert [name for name, _ in called(named)] == ["roll-dice"]
    assert named.tool_choice.name == "roll-dice"


def test_arguments_are_streamed(clean):
    body = {**CALLING, "extra_body": {"seed": 1}}
    whole = create(clean, "How is the weather?", **body)
    with clean.client.responses.stream(input="How is the weather?", **{**USUAL, **body}) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert called(final) == called(whole)
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        *["response.function_call_arguments.delta"] * len(deltas),
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert len(deltas) > 3
    assert "".join(event.delta for event in deltas) == called(whole)[0][1]
    added = next(event for event in events if event.type == "response.output_item.added")
    assert (added.item.arguments, added.item.status, added.item.name) == ("", "in_progress", called(whole)[0][0])
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {added.item.id}


@pytest.mark.parametrize("max_output_tokens", [24, 32])
def test_a_call_that_is_cut_is_said_and_its_conversation_goes_on(clean, max_output_tokens):
    """Its client may answer it, with an error say, or send it back; there may be no arguments yet."""
    changes = {**CALLING, "max_output_tokens": max_output_tokens}
    cut = create(clean, "Weather?", **changes, extra_body={"seed": 1})
    assert (cut.status, cut.output[-1].status) == ("incomplete", "incomplete")
    call = cut.output[-1].to_dict()
    assert bool(call["arguments"]) is (max_output_tokens > 24)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "The arguments are no JSON."}
    assert post(clean, {"previous_response_id": cut.id}).status_code == 200
    assert post(clean, {"previous_response_id": cut.id, "input": [result]}).status_code == 200
    assert post(clean, {"input": [{"role": "user", "content": "Weather?"}, call, result]}).status_code == 200


def test_references_to_items_are_the_items(clean):
    made = create(clean, "Weather?", **CALLING, extra_body={"seed": 1})
    call = made.output[-1].to_dict()
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    question = {"role": "user", "content": "Weather?"}

    def count(reference):
        answer = post(clean, {"input": [question, reference, result], "max_output_tokens": 0})
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["input_tokens"]

    assert count({"type": "item_reference", "id": call["id"]}) == count({"id": call["id"]}) == count(call)
    clean.http.delete(f"/v1/responses/{made.id}")
    gone = post(clean, {"input": [question, {"type": "item_reference", "id": call["id"]}]})
    error = gone.json()["error"]
    assert (gone.status_code, error["param"], error["code"]) == (404, "input.1.id", "item_not_found")


def test_reasoning_text_and_calls_are_items(scripted):
    said = (
        "<think>\nHmm.\n</think>\n\nLet me see.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Oslo", "unit": "C"}}\n</tool_call>'
    )
    with start(files={"chat_template": HERMES}) as server:
        scripted(server, said)
        body = {"tools": TOOLS, "max_output_tokens": 150}
        made = create(server, "How?", **body)
        assert [item.type for item in made.output] == ["reasoning", "message", "function_call"]
        assert made.output[0].content[0].text == "Hmm."
        assert made.output_text == "Let me see."
        assert called(made) == [("get_weather", '{"place": "Oslo", "unit": "C"}')]
        assert 0 < made.usage.output_tokens_details.reasoning_tokens < made.usage.output_tokens
        request = {**USUAL, **body, "input": "How?", "stream": True}
        with server.http.stream("POST", "/v1/responses", json=request) as response:
            events = raw_events(response)
        thought = [one["delta"] for one in events if one["type"] == "response.reasoning_text.delta"]
        assert "".join(thought) == "Hmm."
        added = [one["item"]["type"] for one in events if one["type"] == "response.output_item.added"]
        assert added == ["reasoning", "message", "function_call"]
        assert [one["output_index"] for one in events if one["type"] == "response.output_item.done"] == [0, 1, 2]
        result = {"type": "function_call_output", "call_id": made.output[-1].call_id, "output": "sunny"}
        back = [{"role": "user", "content": "How?"}, *[item.to_dict() for item in made.output], result]
        scripted(server, "It is sunny.")
        whole = create(server, back, **body)
        later = create(server, [result], previous_response_id=made.id, **body)
        assert whole.output_text == later.output_text == "It is sunny."
        assert whole.usage.input_tokens == later.usage.input_tokens
        assert json.loads(server.http.get(f"/v1/responses/{later.id}").text)["model"] == NAME
