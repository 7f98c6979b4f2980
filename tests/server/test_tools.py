"""Calls of tools and reasoning, through the real client: on the bundled model, whose template knows neither, and on
templates that do."""

import json

import jsonschema
import openai
import pytest

from pacellm.demo import MODEL_PATH
from pacellm.tokenizer import ChatTokenizer
from server.calls import CallScanner
from tests.server.conftest import NAME, start

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}
DICE = {"type": "function", "function": {"name": "roll-dice"}}
PARAMETERS = {"get_weather": WEATHER["function"]["parameters"], "roll-dice": {"type": "object", "maxProperties": 0}}

# as Qwen's: a template that shows tools, calls, results and reasoning
HERMES = """\
{%- if tools %}{{- '<|system|>' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}{{- '<|end|>' }}{% endif -%}
{%- for message in messages -%}
{{- '<|user|>' if message.role == 'tool' else '<|' + message.role + '|>' -}}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{% endif -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% if thinking %}{{- '<think>\\n' }}{% endif %}{% endif -%}
"""
RESPONSE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "[[", "close": "]]", "content": "text"},
        "tool_calls": {
            "open_pattern": r"CALL (?P<name>\w+):", "close": ";", "repeats": True, "content": "kv-lines",
            "content_args": {"line_sep": ",", "kv_sep": "="},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}  # fmt: skip


def user(text):
    return [{"role": "user", "content": text}]


def ask(server, **changes):
    body = {"model": NAME, "messages": user("How is the weather?"), "max_tokens": 150, **changes}
    return server.client.chat.completions.create(**body)


def folded(chunks, index=0):
    """What a client makes of a stream: content, reasoning, calls as (name, arguments), reason."""
    content, reasoning, calls, reason = "", "", {}, None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for piece in choice.delta.tool_calls or ():
                if piece.id is not None:
                    assert piece.function.arguments == ""
                    assert piece.index == len(calls)
                    calls[piece.index] = [piece.function.name, ""]
                calls[piece.index][1] += piece.function.arguments
            reason = choice.finish_reason or reason
    return content, reasoning, [tuple(call) for call in calls.values()], reason


def parts(choice):
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", getattr(message, "reasoning_content", None) or "", calls, choice.finish_reason


def check(calls):
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), PARAMETERS[name])


@pytest.fixture
def scripted(monkeypatch):
    """Lets the model of a server say a text, as far as it may."""
    from pacellm.engine import answers as module

    def say(server, text):
        server.service.grammars._load()
        tokens = server.service.grammars._tokens
        script = b" " + text.encode()  # this tokenizer's decoder takes the space off

        def sample(logits, params, prompt, generated, seed, allowed):
            left = script.removeprefix(b"".join(tokens[token] for token in generated))
            fitting = [2] if not left else [t for t, b in enumerate(tokens) if t > 5 and left.startswith(b)]
            may = [token for token in fitting if allowed is None or allowed[token]]
            assert may, f"stopped before {left!r}"
            return max(may, key=lambda token: len(tokens[token])), None

        monkeypatch.setattr(module, "sample", sample)

    return say


@pytest.fixture(scope="module")
def hermes():
    with start(files={"chat_template": HERMES}) as server:
        yield server


# -- any model -------------------------------------------------------------------------------------------------


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
    shown = json.dumps([{"name": call.name, "arguments": json.loads(call.arguments)}], ensure_ascii=False)
    body = {"messages": [messages[0], message.to_dict(), result], "tools": [WEATHER]}
    text = live.service.tokenizer.decode(live.http.post("/tokenize", json=body).json()["tokens"])
    assert shown in text
    assert '{"function": "get_weather", "result": "sunny"}' in text


def test_tools_are_in_the_prompt(live):
    def text(**body):
        body = {"messages": [*user("hi")], **body}
        ids = live.http.post("/tokenize", json=body).json()["tokens"]
        return live.service.tokenizer.decode(ids)

    assert '"name": "get_weather"' in text(tools=[WEATHER])
    both = text(tools=[WEATHER], messages=[{"role": "system", "content": "Be brief."}, *user("hi")])
    assert both.count("<|system|>") == 1
    assert "get_weather" not in text()


def test_auto_needs_a_template_with_tools(live):
    for choice in ({}, {"tool_choice": "auto"}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(live, tools=[WEATHER], **choice)
        assert (caught.value.param, caught.value.code) == ("tool_choice", "unsupported_parameter")
        assert "required" in caught.value.message
    ask(live, tools=[WEATHER], tool_choice="none", max_tokens=2)
    ask(live, tools=[], tool_choice="auto", max_tokens=2)


def function(**changes):
    return {"type": "function", "function": {"name": "f", **changes}}


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
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
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}]},
        "messages.0.tool_calls.0.function.arguments",
    ),
    "reasoning": (
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]}, "messages.0.reasoning_content",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_with_the_field_named(live, name):
    changes, param = BAD[name]
    body = {"tools": [function()], "tool_choice": "required", "messages": user("x"), "max_tokens": 2, **changes}
    answer = live.http.post("/v1/chat/completions", json={"model": NAME, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


# -- templates with tools ----------------------------------------------------------------------------------------

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


# -- reading -------------------------------------------------------------------------------------------------------


def scan(pieces):
    scanner, calls = CallScanner(), []
    for piece in pieces:
        for delta in scanner.push(piece):
            (call,) = delta["tool_calls"]
            if "id" in call:
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    return [tuple(call) for call in calls], scanner.finish()


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "arguments": {"a": [1, {"b": "}]\\",:"}]}}', [("f", '{"a": [1, {"b": "}]\\",:"}]}')]),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x":\n1}}]', [("f", "{}"), ("g", '{"x":\n1}')]),
        ('{"arguments": {"a": 1}, "name": "f"}', [("f", '{"a": 1}')]),
        ('{"name": "f", "parameters": {"a": 1}\n}', [("f", '{"a": 1}')]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", '{"a": 1}')]),
        ('{"name": "f"}', [("f", "{}")]),
        ('{"name": "f", "more": [1], "arguments": {"a": "é"}}', [("f", '{"a": "é"}')]),
    ],
)
def test_calls_are_read_however_the_text_is_cut(text, calls):
    for size in (1, 2, 3, 7, len(text)):
        assert scan([text[i : i + size] for i in range(0, len(text), size)])[0] == calls


@pytest.mark.parametrize("text", ["nonsense", "", "{", '{"name": 5}', '{"arguments": {}}', "]]]", '[["name"]]', '"'])
def test_what_is_no_call_is_given_back(text):
    assert scan(text) == ([], text)


def test_dialects():
    plain = ChatTokenizer(MODEL_PATH)
    assert (plain.dialect.template, plain.dialect.reads_tools, plain.dialect.writes_calls) == (None, False, False)
    tagged = ChatTokenizer(MODEL_PATH)
    tagged._tokenizer.chat_template = "{{ tools }}{{ tool_calls }}<tool_call><function=x><parameter=y></tool_call>"
    tools = [function(parameters={"type": "object", "properties": {"n": {"type": "integer"}}})]
    parser = tagged.response_parser(tagged.dialect, "", tools, continues=False)
    parser.feed("hi <tool_call>\n<function=f>\n<parameter=n>\n7\n</parameter>\n</function>\n</tool_call>")
    (call,) = parser.finalize()[0]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"n": 7}}
