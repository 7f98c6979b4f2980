"""Calls of tools through the real client, on the bundled model, whose template knows none."""

import json

import pytest

from pacellm.server.reading.tools import CalledFunction
from tests.server.conftest import NAME
from tests.server.talk import CALL, DICE, PARAMETERS, WEATHER, ask, check, folded, function, parts, user


def test_a_call_is_required(live):
    answer = ask(live, tools=[WEATHER, DICE], tool_choice="required", parallel_tool_calls=False, n=8, seed=1)
    names = set()
    for choice in answer.choices:
        _, _, calls, reason = parts(choice)
        assert (len(calls), reason, choice.message.content) == (1, "tool_calls", None)
        check(calls)
        names.add(calls[0][0])
        assert choice.message.tool_calls[0].id.startswith("call_")
        assert choice.message.tool_calls[0].type == "function"
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 8
    assert names <= set(PARAMETERS)


def test_several_calls(live):
    answer = ask(live, tools=[WEATHER, DICE], tool_choice="required", n=8, seed=1, max_tokens=200)
    counts = set()
    for choice in answer.choices:
        _, _, calls, reason = parts(choice)
        assert reason in ("tool_calls", "length")
        check(calls if reason == "tool_calls" else calls[:-1])
        counts.add(len(calls))
    assert max(counts) > 1


def test_a_named_function(live):
    for name, tools in (("roll-dice", [WEATHER, DICE]), ("get_weather", [WEATHER])):
        choice = {"type": "function", "function": {"name": name}}
        _, _, calls, reason = parts(ask(live, tools=tools, tool_choice=choice, seed=2).choices[0])
        assert reason == "stop"
        assert [call[0] for call in calls] == [name]
        check(calls)


def test_the_stream_folds_to_the_whole_answer(live):
    body = {"tools": [WEATHER, DICE], "tool_choice": "required", "parallel_tool_calls": False, "n": 3, "seed": 4}
    whole = ask(live, **body, logprobs=True)
    chunks = list(ask(live, **body, logprobs=True, stream=True))
    for index, choice in enumerate(whole.choices):
        assert folded(chunks, index) == parts(choice)
        logprobs = [i for c in chunks for o in c.choices if o.index == index and o.logprobs for i in o.logprobs.content]
        assert logprobs == choice.logprobs.content
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)


def test_arguments_come_piece_by_piece(live):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(ask(live, tools=[WEATHER], tool_choice=choice, seed=2, stream=True))
    pieces = [p for c in chunks for o in c.choices for p in o.delta.tool_calls or ()]
    assert pieces[0].function.name == "get_weather"
    assert len(pieces) > 4
    assert all(piece.id is None for piece in pieces[1:])


def test_calls_and_results_go_back_in_a_session(live):
    first = ask(live, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, seed=1,
                extra_body={"session_id": "tools"})  # fmt: skip
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    messages = [*user("How is the weather?"), message, result]
    second = ask(live, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=3,
                 extra_body={"session_id": "tools"})  # fmt: skip
    assert second.pacellm["session"] == "resident"
    assert second.choices[0].message.tool_calls is None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    call = message.tool_calls[0].function
    shown = json.dumps({"name": call.name, "arguments": json.loads(call.arguments)}, ensure_ascii=False)
    body = {"messages": [messages[0], message.to_dict(), result], "tools": [WEATHER]}
    text = live.service.tokenizer.decode(live.http.post("/tokenize", json=body).json()["tokens"])
    assert f"<tool_call>{shown}</tool_call>" in text
    assert "Result of get_weather: sunny" in text


def test_tools_are_in_the_prompt(live):
    def text(**body):
        body = {"messages": [*user("hi")], **body}
        ids = live.http.post("/tokenize", json=body).json()["tokens"]
        return live.service.tokenizer.decode(ids)

    assert '"name": "get_weather"' in text(tools=[WEATHER])
    both = text(tools=[WEATHER], messages=[{"role": "system", "content": "Be brief."}, *user("hi")])
    assert both.count("<|system|>") == 1
    assert "get_weather" not in text()


def test_by_itself_a_model_calls_or_answers(live):
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        answer = ask(live, tools=[WEATHER, DICE], **choice, n=8, seed=1, max_tokens=80)
        for one in answer.choices:
            content, _, calls, reason = parts(one)
            assert not (calls and content) or reason == "length"  # a random answer may be empty
            assert not content.startswith("<")
            check(calls if reason != "length" else calls[:-1])
            assert not (calls and choice == {"tool_choice": "none"})
    ask(live, tools=[], tool_choice="auto", max_tokens=2)


BAD = {
    "name": ({"tools": [function(name="a b")]}, "tools.0.function.name"),
    "long name": ({"tools": [function(name="a" * 65)]}, "tools.0.function.name"),
    "twice": ({"tools": [function(), function()]}, "tools.1.function.name"),
    "no object": ({"tools": [function(parameters={"type": "string"})]}, "tools.0.function.parameters"),
    "schema": (
        {"tools": [DICE, function(parameters={"type": "object", "properties": {"x": {"type": "nonsense"}}})]},
        "tools.1.function.parameters",
    ),
    "strict": (
        {"tools": [function(strict=True, parameters={"type": "object", "not": {}})]}, "tools.0.function.parameters",
    ),
    "type": ({"tools": [{**function(), "type": "web_search"}]}, "tools.0.type"),
    "too many": ({"tools": [function(name=f"f{number}") for number in range(129)]}, "tools"),
    "unknown": ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
    "choice": ({"tool_choice": "maybe"}, "tool_choice"),
    "nothing required": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "with structure": ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "function_call": ({"function_call": {"name": "f"}}, "function_call"),
    "result of nothing": (
        {"messages": [*user("x"), {"role": "tool", "tool_call_id": "call_2", "content": "x"}]},
        "messages.1.tool_call_id",
    ),
    "result without id": ({"messages": [*user("x"), {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id"),
    "user's call": ({"messages": [{**user("x")[0], "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_with_the_field_named(live, name):
    changes, param = BAD[name]
    body = {"tools": [function()], "tool_choice": "required", "messages": user("x"), "max_tokens": 2, **changes}
    answer = live.http.post("/v1/chat/completions", json={"model": NAME, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize(
    ("sent", "text"), [(None, ""), ("", ""), ({"a": 1}, '{"a": 1}'), ([], "[]"), (0, "0"), ("{cut", "{cut")]
)
def test_arguments_that_a_client_has_read_are_text_again(sent, text):
    assert CalledFunction.model_validate({"name": "f", "arguments": sent}).arguments == text
