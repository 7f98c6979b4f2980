"""Calls and reasoning on templates that know them, through the real client."""

import json

import openai
import pytest

from tests.server.conftest import start
from tests.server.talk import CALL, DICE, HERMES, RESPONSE, WEATHER, ask, check, folded, function, parts, user


@pytest.fixture(scope="module")
def hermes():
    with start(files={"chat_template": HERMES}) as server:
        yield server


CALLS = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Oslo", "unit": "C"}}\n</tool_call>'
ROLL = '<tool_call>\n{"name": "roll-dice", "arguments": {}}\n</tool_call>'
OSLO = ("get_weather", '{"place": "Oslo", "unit": "C"}')


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("Just text.", ("Just text.", "", [], "stop")),
        (CALLS, ("", "", [OSLO], "tool_calls")),
        (f"Let me see.\n{CALLS}", ("Let me see.", "", [OSLO], "tool_calls")),
        (f"{CALLS}\n{ROLL}", ("", "", [OSLO, ("roll-dice", "{}")], "tool_calls")),
        (f"<think>\nHmm, {{}}.\n</think>\n\nYes.\n{CALLS}", ("Yes.", "Hmm, {}.", [OSLO], "tool_calls")),
    ],
)
def test_auto_on_a_template_with_tools(hermes, scripted, said, heard):
    scripted(hermes, said)
    body = {"tools": [WEATHER, DICE]}
    assert parts(ask(hermes, **body).choices[0]) == heard
    assert folded(ask(hermes, **body, stream=True)) == heard


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    ("written", "meant"), [(r"\u00e9\ud83d\ude00", "é😀"), ("a</tool_call>", "a</tool_call>"), (r"\n\"}}", '\n"}}')]
)
def test_arguments_are_json_as_the_model_writes_it(hermes, scripted, choice, written, meant):
    """Characters by their numbers, end marks, quotes: what the constraint lets through, and what is read."""
    tool = function(
        parameters={"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
    )
    arguments = f'{{"a": "{written}"}}'
    scripted(hermes, f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>')
    body = {"tools": [tool], "tool_choice": choice}
    heard = ("", "", [("f", arguments)], "tool_calls")
    assert parts(ask(hermes, **body).choices[0]) == heard
    assert folded(ask(hermes, **body, stream=True)) == heard
    assert json.loads(arguments) == {"a": meant}


def test_auto_lets_no_wrong_call_begin(hermes, scripted, monkeypatch):
    for said in (CALLS.replace("get_weather", "set_weather"), CALLS.replace('"C"', '"K"'), CALLS.replace("}}", "}")):
        scripted(hermes, said)
        with pytest.raises(openai.InternalServerError):
            ask(hermes, tools=[WEATHER, DICE])


def test_one_call_where_only_one_may_be(hermes, scripted):
    scripted(hermes, f"Well. {CALLS}\n{ROLL}")
    answer = ask(hermes, tools=[WEATHER, DICE], parallel_tool_calls=False)
    assert parts(answer.choices[0]) == ("Well.", "", [OSLO], "tool_calls")


def test_required_and_named_in_the_models_own_way(hermes, scripted):
    named = {"type": "function", "function": {"name": "roll-dice"}}
    for choice, said, heard in (
        ("required", f"{CALLS}\n{ROLL}", ("", "", [OSLO, ("roll-dice", "{}")], "tool_calls")),
        ("required", f"<think>Hm.</think>\n{CALLS}", ("", "Hm.", [OSLO], "tool_calls")),
        (named, ROLL, ("", "", [("roll-dice", "{}")], "stop")),
    ):
        scripted(hermes, said)
        assert parts(ask(hermes, tools=[WEATHER, DICE], tool_choice=choice).choices[0]) == heard
    for choice, said in (("required", "Text."), (named, CALLS)):
        scripted(hermes, said)
        with pytest.raises(openai.InternalServerError):
            ask(hermes, tools=[WEATHER, DICE], tool_choice=choice)


def test_sampled_calls_in_the_models_own_way():
    template = HERMES.replace("<think>", "[").replace("</think>", "]")
    with start(files={"chat_template": template}) as server:
        answer = ask(server, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, n=8, seed=1)
        for choice in answer.choices:
            content, _, calls, reason = parts(choice)
            assert (len(calls), content, reason) == (1, "", "tool_calls")
            check(calls)


def test_a_form_or_a_call(hermes, scripted):
    body = {"tools": [WEATHER], "response_format": {"type": "json_object"}}
    for said, heard in ((CALLS, ("", "", [OSLO], "tool_calls")), ('{"a": 1}', ('{"a": 1}', "", [], "stop"))):
        scripted(hermes, said)
        assert parts(ask(hermes, **body).choices[0]) == heard
    scripted(hermes, "text")
    with pytest.raises(openai.InternalServerError):
        ask(hermes, **body)


def test_without_tools_a_call_is_text(hermes, scripted):
    scripted(hermes, f"See:\n{CALLS}")
    for body in ({}, {"tools": [WEATHER, DICE], "tool_choice": "none"}):
        assert parts(ask(hermes, **body).choices[0]) == (f"See:\n{CALLS}", "", [], "stop")


def test_reasoning_that_the_prompt_has_begun(hermes, scripted):
    scripted(hermes, "First this.\n</think>\n\nThen that.")
    body = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    heard = ("Then that.", "First this.", [], "stop")
    whole = ask(hermes, **body)
    assert parts(whole.choices[0]) == heard
    assert whole.choices[0].message.reasoning == "First this."
    assert folded(ask(hermes, **body, stream=True)) == heard
    scripted(hermes, 'I see.</think>{"a": 2}')
    form = {"response_format": {"type": "json_object"}, **body}
    assert parts(ask(hermes, **form).choices[0]) == ('{"a": 2}', "I see.", [], "stop")
    scripted(hermes, f"I see.</think>\n{CALLS}")
    assert parts(ask(hermes, tools=[WEATHER], **body).choices[0]) == ("", "I see.", [OSLO], "tool_calls")
    assert parts(ask(hermes, tools=[WEATHER], tool_choice="required", **body).choices[0])[2:] == ([OSLO], "tool_calls")


def test_reasoning_cut_by_length_is_reasoning(hermes, scripted):
    scripted(hermes, "<think>\nOn and on and on and on")
    content, reasoning, calls, reason = parts(ask(hermes, max_tokens=9).choices[0])
    assert (content, calls, reason) == ("", [], "length")
    assert reasoning.startswith("On")


def test_earlier_calls_results_and_reasoning_are_shown(hermes):
    call = {**CALL, "function": {"name": "get_weather", "arguments": '{"place": "Oslo", "unit": "C"}'}}
    messages = [
        *user("How?"),
        {"role": "assistant", "content": None, "reasoning_content": "Ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    ids = hermes.http.post("/tokenize", json={"messages": messages, "tools": [WEATHER]}).json()["tokens"]
    text = hermes.service.tokenizer.decode(ids)
    assert "Ask." in text
    assert CALLS.replace("\n", "") in text.replace("\n", "")
    assert "sunny" in text
    assert "Weather of a place" in text


def test_a_response_template_that_comes_with_the_tokenizer(scripted):
    template = HERMES.replace("<think>", "[[").replace("</think>", "]]").replace("tool_call>", "x>")
    with start(files={"chat_template": template, "response_template": RESPONSE}) as server:
        scripted(server, "[[Why not.]]So: CALL get_weather:place=Oslo,unit=C;")
        heard = ("So: ", "Why not.", [OSLO], "tool_calls")
        assert parts(ask(server, tools=[WEATHER]).choices[0]) == heard
        assert folded(ask(server, tools=[WEATHER], stream=True)) == heard
        for changes, param in (
            ({"parallel_tool_calls": False}, "parallel_tool_calls"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"tools": [function(strict=True)]}, "tools.0.function.strict"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(server, **{"tools": [WEATHER], **changes})
            assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
