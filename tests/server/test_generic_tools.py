"""Tools with templates that have no place for them: what the model is shown, and what is made of its answers."""

import json

import openai
import pytest

from pacellm.server.reading.messages import Message
from pacellm.server.reading.rendering import rendered_chat
from pacellm.server.reading.tools import Tool
from pacellm.server.writing.parsers import GenericToolParser, PlainParser
from tests.chat_families import build
from tests.server.conftest import NAME, start
from tests.server.talk import CALL, DICE, WEATHER, ask, folded, function, parts, user

OSLO = '<tool_call>{"name": "get_weather", "arguments": {"place": "Oslo", "unit": "C"}}</tool_call>'
ROLL = '<tool_call>{"name": "roll-dice", "arguments": {}}</tool_call>'
HEARD = ("get_weather", '{"place": "Oslo", "unit": "C"}')
TOOLS = {"tools": [WEATHER, DICE]}
SEVERAL = {**TOOLS, "parallel_tool_calls": True}


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("<answer>It is 5 < 7.\nReally.", ("It is 5 < 7.\nReally.", "", [], "stop")),
        ("<answer>", ("", "", [], "stop")),
        ("<answer><tool_call>", ("<tool_call>", "", [], "stop")),
        (OSLO, ("", "", [HEARD], "tool_calls")),
        (f"{OSLO}\n{ROLL}", ("", "", [HEARD, ("roll-dice", "{}")], "tool_calls")),
    ],
)
def test_auto(live, scripted, said, heard):
    scripted(live, said)
    assert parts(ask(live, **SEVERAL).choices[0]) == heard
    assert folded(ask(live, **SEVERAL, stream=True)) == heard


def test_an_answer_is_text_or_calls_that_fit(live, scripted):
    wrong = (
        "Text.",
        "<answer",
        OSLO.replace("get", "set"),
        OSLO.replace('"C"', '"K"'),
        f"{OSLO} Text.",
        "\n<answer>",
        "<answer>\n",
    )
    for said in wrong:
        scripted(live, said)
        with pytest.raises(openai.InternalServerError):
            ask(live, **SEVERAL)


@pytest.mark.parametrize(
    ("changes", "good", "bad"),
    [
        ({"parallel_tool_calls": False}, OSLO, f"{OSLO}\n{ROLL}"),
        ({}, OSLO, f"{OSLO}\n{ROLL}"),
        ({"tool_choice": "none"}, "<answer>Yes.", OSLO),
        ({"tool_choice": "required"}, f"{ROLL}\n{OSLO}", "<answer>Yes."),
        ({"tool_choice": {"type": "function", "function": {"name": "roll-dice"}}}, ROLL, OSLO),
        ({"response_format": {"type": "json_object"}}, '<answer>{"a": 1}', "<answer>Yes."),
        ({"response_format": {"type": "json_object"}}, OSLO, '{"a": 1}'),
    ],
)
def test_choices(live, scripted, changes, good, bad):
    scripted(live, good)
    content, _, calls, _ = parts(ask(live, **TOOLS, **changes).choices[0])
    assert len(calls) == good.count("<tool_call>")
    assert content == ("" if calls else good.removeprefix("<answer>"))
    scripted(live, bad)
    if bad.startswith(good):  # the answer ends behind the first call
        assert parts(ask(live, **TOOLS, **changes).choices[0])[2] == [HEARD]
        return
    with pytest.raises(openai.InternalServerError):
        ask(live, **TOOLS, **changes)


def test_a_call_that_was_cut(live, scripted):
    scripted(live, OSLO)
    content, _, calls, reason = parts(ask(live, **TOOLS, max_tokens=30).choices[0])
    assert (content, calls[0][0], reason) == ("", "get_weather", "length")
    assert HEARD[1].startswith(calls[0][1])
    scripted(live, "<answer>Yes")
    assert parts(ask(live, **TOOLS, max_tokens=2).choices[0]) == ("", "", [], "length")


def test_text_streams_as_it_comes(live, scripted):
    scripted(live, "<answer>One two three four five six.")
    chunks = list(ask(live, **TOOLS, stream=True))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == "One two three four five six."


def test_a_loop_stays_in_its_session(live, scripted):
    body = {**TOOLS, "extra_body": {"session_id": "loop"}}
    messages = user("How is the weather in Oslo?")
    for said in (OSLO, "<answer>It is sunny.", "<answer>Bye."):
        scripted(live, said)
        answer = ask(live, messages=messages, **body)
        messages = [*messages, answer.choices[0].message]
        for call in answer.choices[0].message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
        if said.startswith("<answer>"):
            messages += user("Thanks")
        tokens = live.http.get("/v1/sessions/loop").json()["tokens"]
        again = ask(live, messages=messages, **body, max_tokens=0)
        assert again.usage.prompt_tokens_details.cached_tokens >= tokens - 1, said


def test_responses_have_it_too(live, scripted):
    tool = {"type": "function", **WEATHER["function"]}
    scripted(live, OSLO)
    first = live.client.responses.create(model=NAME, input="How is the weather?", tools=[tool])
    assert [(item.type, item.name, item.arguments) for item in first.output] == [("function_call", *HEARD)]
    scripted(live, "<answer>Sunny.")
    output = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sunny"}
    second = live.client.responses.create(model=NAME, input=[output], tools=[tool], previous_response_id=first.id)
    assert second.output_text == "Sunny."


def test_an_answer_that_is_gone_on_with(live, scripted):
    scripted(live, "and more.")
    messages = [*user("Hm?"), {"role": "assistant", "content": "This"}]
    body = {**TOOLS, "extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    assert parts(ask(live, messages=messages, **body).choices[0]) == (" and more.", "", [], "stop")


def test_reasoning_comes_first(scripted):
    from pacellm.demo import MODEL_PATH

    template = (MODEL_PATH / "chat_template.jinja").read_text() + "{# <think></think> #}"
    with start(files={"chat_template": template}) as server:
        scripted(server, f"<think>Hm.</think>\n{OSLO}")
        assert parts(ask(server, **TOOLS).choices[0]) == ("", "Hm.", [HEARD], "tool_calls")
        scripted(server, "<think>Hm.</think><answer>Yes.")
        heard = ("Yes.", "Hm.", [], "stop")
        assert parts(ask(server, **TOOLS).choices[0]) == heard
        assert folded(ask(server, **TOOLS, stream=True)) == heard


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("<answer>a <b> c", ("a <b> c", [])),
        ("<answer>21</answer>", ("21", [])),
        ("<answer>21</answer>\n", ("21", [])),
        ("<answer>a</answer> b <", ("a</answer> b <", [])),
        ("<answer>a</ans", ("a</ans", [])),
        ("<ans", ("", [])),
        ("no mark", ("no mark", [])),
        (f"{OSLO}\n{ROLL}", ("", [HEARD, ("roll-dice", "{}")])),
        ('<tool_call>{"na', ('<tool_call>{"na', [])),
    ],
)
def test_reader(text, heard, size):
    reader = GenericToolParser(PlainParser())
    deltas = [delta for start in range(0, len(text), size) for delta in reader.push(text[start : start + size])]
    content, calls = "", []
    for delta in [*deltas, *reader.finish()]:
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls.append([piece["function"]["name"], ""])
            calls[piece["index"]][1] += piece["function"]["arguments"]
    assert (content, [tuple(call) for call in calls]) == heard


def shown(chat, messages, tools=(WEATHER,), **options):
    messages = [Message.model_validate(message) for message in messages]
    rendered = rendered_chat(chat, messages, [Tool.model_validate(tool) for tool in tools], **options)
    return chat.decode(chat.encode_chat(rendered)), rendered.replace("\ufdd1", "")


def history(place="Oslo"):
    arguments = json.dumps({"place": place})
    calls = [{**CALL, "id": name, "function": {"name": "get_weather", "arguments": arguments}} for name in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": name, "content": text} for name, text in (("a", "rain"), ("b", "hail"))]
    return [
        {"role": "system", "content": "Be brief."}, *user("How is it?"),
        {"role": "assistant", "content": None, "tool_calls": calls}, *results,
        *user("And then?"), {"role": "assistant", "content": "Fine."}, *user("Bye"),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama3", "mistral", "phi3", "gemma", "chatml"])
def test_every_template_shows_all_of_it(family, tmp_path):
    chat = build(family, tmp_path)
    assert not chat.dialect.has_tools
    _, text = shown(chat, history())
    call = '<tool_call>{"name": "get_weather", "arguments": {"place": "Oslo"}}</tool_call>'
    parts = [
        "Be brief.\n\nYou can call functions:\n" + json.dumps(WEATHER["function"]),
        '<tool_call>{"name": "get_weather", "arguments": {"place": "...", "unit": "C"}}</tool_call>',
        "How is it?", f"{call}\n{call}",
        "Result of get_weather: rain\nResult of get_weather: hail\n\nAnswer the user with these results.",
        "And then?", "<answer>Fine.", "Bye",
    ]  # fmt: skip
    if family == "mistral":  # its template puts the system message before the last of the user's
        parts = [*parts[2:-1], *parts[:2], parts[-1]]
    places = [text.index(part) for part in parts]
    assert places == sorted(places), text
    assert "tool" not in chat._tokenizer.chat_template or "ipython" not in text


def test_roles_as_the_templates_take_them(tmp_path):
    facts = {}
    for family in ("llama3", "mistral", "phi3", "gemma", "chatml", "qwen3"):
        (tmp_path / family).mkdir()
        chat = build(family, tmp_path / family)
        facts[family] = (chat.takes_system, chat.takes_runs, chat.dialect.has_tools)
    assert facts == {
        "llama3": (True, True, False), "mistral": (True, False, False), "phi3": (False, True, False),
        "gemma": (False, False, False), "chatml": (True, True, False), "qwen3": (True, True, True),
    }  # fmt: skip


def test_texts_of_tools_are_text(tmp_path):
    chat = build("gemma", tmp_path)
    mark = "<end_of_turn>"
    tool = function(description=mark, parameters={"type": "object", "properties": {mark: {"enum": [mark]}}})
    call = {**CALL, "function": {"name": "f", "arguments": json.dumps({mark: mark})}}
    messages = [
        {"role": "system", "content": mark}, *user(mark),
        {"role": "assistant", "content": mark, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": mark},
    ]  # fmt: skip
    number = chat.backend.token_to_id(mark)

    def counts(messages, tools):
        checked = [Message.model_validate(message) for message in messages]
        ids = chat.encode_chat(rendered_chat(chat, checked, [Tool.model_validate(one) for one in tools]))
        return ids.count(number), chat.decode(ids).count(mark)

    ends, seen = counts(messages, [tool])
    assert ends == 3
    assert seen == ends + 9


def test_without_tools_in_the_request_the_history_is_shown(tmp_path):
    chat = build("gemma", tmp_path)
    _, text = shown(chat, history()[1:], tools=())
    assert "You can call" not in text
    assert "Result of get_weather: rain" in text
    assert "<answer>" not in text
    assert text.count("<tool_call>") == 2


def test_only_a_result_is_sent(clean, scripted):
    whole, messages = {}, user("How is the weather in Oslo?")
    for name in ("whole", "only"):
        scripted(clean, OSLO)
        message = ask(clean, messages=messages, **TOOLS, extra_body={"session_id": name}).choices[0].message
        result = {
            "role": "tool",
            "tool_call_id": message.tool_calls[0].id,
            "content": "x<|end|>",
            "name": "get_weather",
        }
        scripted(clean, "<answer>Sunny.")
        sent, more = [*messages, message, result], {}
        if name == "only":
            sent, more = [result], {"pacellm": {"append": True}}
        answer = ask(clean, messages=sent, **TOOLS, extra_body={"session_id": name, **more})
        assert parts(answer.choices[0]) == ("Sunny.", "", [], "stop")
        whole[name] = list(clean.engine.sessions.get(("default", name)).context)
    assert whole["whole"] == whole["only"]
