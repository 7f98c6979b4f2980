"""Every optional field of OpenAI's three APIs, from openai-python's types: it is served, a hint or refused, as the page
says."""

import json
import re
import typing
from pathlib import Path

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatFields
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionFields
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponseFields

from pacellm.config import EngineConfig
from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.server.api.chat.schema import parse_chat
from pacellm.server.api.completions.schema import parse_completion
from pacellm.server.api.responses.schema import parse_response
from pacellm.server.reading.chat_input import ChatInput
from pacellm.server.reading.hints import told
from pacellm.server.reading.messages import Message
from tests.server.conftest import NAME, start
from tests.server.talk import HERMES, WEATHER

HI = [{"role": "user", "content": "x"}]
APIS = {
    "chat": (ChatFields, parse_chat, {"messages": HI}),
    "completions": (CompletionFields, parse_completion, {"prompt": "x"}),
    "responses": (ResponseFields, parse_response, {"input": "x"}),
}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
FUNCTION = {"type": "function", **WEATHER["function"]}
# values that clients send, by class
SERVED = {
    "chat": {
        "frequency_penalty": 1, "logit_bias": {"5": 1}, "logprobs": True, "max_completion_tokens": 5, "max_tokens": 5,
        "n": 2, "parallel_tool_calls": False, "presence_penalty": -1.5, "response_format": {"type": "json_object"},
        "seed": 3, "stop": ["a"], "stream": True, "stream_options": {"include_obfuscation": False}, "temperature": 1,
        "tool_choice": "auto", "tools": [WEATHER], "top_logprobs": 0, "top_p": 0.5,
    },
    "completions": {
        "echo": True, "frequency_penalty": 1, "logit_bias": {"5": 1}, "logprobs": 2, "max_tokens": 5, "n": 2,
        "presence_penalty": 1, "seed": 3, "stop": "a", "stream": True, "stream_options": {"include_usage": True},
        "temperature": 0, "top_p": 1,
    },
    "responses": {
        "conversation": {"id": "c"}, "input": HI, "instructions": "Be brief.", "max_output_tokens": 5,
        "metadata": {"a": "b"}, "model": NAME, "parallel_tool_calls": True, "previous_response_id": "resp_1",
        "store": False, "stream": False, "stream_options": {}, "temperature": 1, "text": {"verbosity": "low"},
        "tool_choice": "auto", "tools": [FUNCTION], "top_p": 0.5,
    },
}  # fmt: skip
_SHARED = {
    "metadata": [{}, {"a": "b"}], "prompt_cache_key": ["k"], "prompt_cache_retention": ["in_memory", "24h"],
    "prompt_cache_options": [{"mode": "implicit", "ttl": "30m"}], "safety_identifier": ["s"], "user": ["u"],
    "service_tier": ["auto", "default", "flex", "scale", "priority", "fast"],
}  # fmt: skip
EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]
HINTS = {
    "chat": _SHARED | {
        "prediction": [{"type": "content", "content": "x"},
                       {"type": "content", "content": [{"type": "text", "text": "x"}]}],
        "reasoning_effort": EFFORTS, "store": [True, False], "verbosity": ["low", "medium", "high"],
    },
    "completions": {"user": ["u"]},
    "responses": {name: values for name, values in _SHARED.items() if name != "metadata"} | {
        "include": [[], ["reasoning.encrypted_content"], ["web_search_call.results", "file_search_call.results"]],
        "max_tool_calls": [1, 100],
        "reasoning": [{}, *({"effort": one} for one in EFFORTS), {"effort": "medium", "summary": "auto"},
                      {"summary": "detailed"}, {"generate_summary": "concise"}, {"effort": None, "summary": None}],
    },
}  # fmt: skip
# field by field: values that are refused, and those that are taken
REFUSED = {
    "chat": {
        "audio": ([{"voice": "alloy", "format": "wav"}], []), "function_call": ([{"name": "f"}], ["none", "auto"]),
        "functions": ([[{"name": "f"}]], [[]]), "modalities": ([["text", "audio"], ["audio"]], [["text"]]),
        "moderation": ([{"model": "m"}], []), "web_search_options": ([{}, {"search_context_size": "low"}], []),
    },
    "completions": {"best_of": ([2], [1, 1.0]), "suffix": (["x"], [""])},
    "responses": {
        "access_programs": ([{"cyber": "standard"}], []), "background": ([True], [False]),
        "background_options": ([{"completion_window": "2h"}], []),
        "context_management": ([[{"type": "compaction"}]], []), "image": ([{"context_compression": "auto"}], []),
        "moderation": ([{"model": "m"}], []), "prompt": ([{"id": "pmpt_1"}], []), "top_logprobs": ([5], [0, 0.0]),
        "truncation": (["auto"], ["disabled"]),
    },
}  # fmt: skip


def page():
    """The page's table: names by class and API, as they are there."""
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    section = text[text.index("## OpenAI's optional fields") :]
    found = {}
    for kind in ("served", "hints", "refused"):
        (row,) = re.findall(rf"^\| {kind} \|(.*)\|$", section, re.MULTILINE)
        for api, cell in zip(APIS, row.split("|"), strict=True):
            found[kind, api] = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", cell))
    return found


def optional(api):
    fields, _, least = APIS[api]
    required = {"messages", "model"} if api == "chat" else {"prompt", "model"} if api == "completions" else set()
    assert required <= {*fields.__required_keys__, *least, "model"}
    return typing.get_type_hints(fields).keys() - required


def parsed(api, **changes):
    _, parse, least = APIS[api]
    return parse(json.dumps(least | changes).replace("Infinity", "1e400").encode())


@pytest.mark.parametrize("api", APIS)
def test_every_field_is_on_the_page_once_and_tried_here(api):
    classes = page()
    listed = [name for kind in ("served", "hints", "refused") for name in classes[kind, api]]
    assert sorted(listed) == sorted(optional(api))
    for kind, tried in (("served", SERVED), ("hints", HINTS), ("refused", REFUSED)):
        assert set(classes[kind, api]) == set(tried[api]), kind


@pytest.mark.parametrize(("api", "name"), [(api, name) for api in APIS for name in SERVED[api]])
def test_served(api, name):
    more = {"stream": True} if name == "stream_options" else {}
    body = parsed(api, **{name: SERVED[api][name], **more})
    assert getattr(body, name) is not None


@pytest.mark.parametrize(("api", "name"), [(api, name) for api in APIS for name in HINTS[api]])
def test_hints_change_nothing(api, name):
    plain = parsed(api)
    for value in HINTS[api][name]:
        body = parsed(api, **{name: value})
        assert body.sampling() == plain.sampling()
        assert body.model_dump(exclude={name}) == plain.model_dump(exclude={name})
    with pytest.raises(RequestError) as caught:
        parsed(api, **{name: 7.5})
    assert caught.value.param.split(".")[0] == name


@pytest.mark.parametrize(("api", "name"), [(api, name) for api in APIS for name in REFUSED[api]])
def test_refused_by_name(api, name):
    refused, taken = REFUSED[api][name]
    for value in refused:
        with pytest.raises(UnsupportedParameter) as caught:
            parsed(api, **{name: value})
        assert caught.value.param == name
        assert name in caught.value.message
    for value in taken:
        assert parsed(api, **{name: value}).sampling() == parsed(api).sampling()


@pytest.mark.parametrize(
    ("api", "field", "value"),
    [
        (
            "chat",
            "stream_options.include_obfuscation",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
        ),
        ("chat", "prompt_cache_options.mode", {"prompt_cache_options": {"mode": "explicit"}}),
        ("chat", "service_tier", {"service_tier": "gold"}),
        ("responses", "include.0", {"include": ["message.output_text.logprobs"]}),
        ("responses", "reasoning.mode", {"reasoning": {"mode": "pro"}}),
        ("responses", "reasoning.context", {"reasoning": {"context": "all_turns"}}),
        ("responses", "prompt_cache_options.prewarm", {"prompt_cache_options": {"prewarm": True}}),
    ],
)
def test_parts_of_fields_are_refused_by_name(api, field, value):
    with pytest.raises(RequestError) as caught:
        parsed(api, **value)
    assert caught.value.param == field


def test_null_is_absent_in_stream_options_too():
    body = parsed("chat", stream=True, stream_options={"include_usage": None, "include_obfuscation": None})
    assert not body.wants_usage()


def mentions_int(hint):
    return hint is int or any(mentions_int(one) for one in typing.get_args(hint))


def integers(api):
    hints = typing.get_type_hints(APIS[api][0])
    return sorted(name for name in optional(api) if mentions_int(hints[name]) and name != "logit_bias")


@pytest.mark.parametrize(("api", "name"), [(api, name) for api in APIS for name in integers(api)])
def test_whole_floats_are_integers(api, name):
    assert parsed(api, **{name: 0.0 if name == "top_logprobs" else 1.0}) == parsed(
        api, **{name: 0 if name == "top_logprobs" else 1}
    )
    for wrong in (16.5, "1", True, float("inf")):
        with pytest.raises(RequestError) as caught:
            parsed(api, **{name: wrong})
        assert caught.value.param == name


def test_the_integers_are_these():
    assert integers("chat") == ["max_completion_tokens", "max_tokens", "n", "seed", "top_logprobs"]
    assert integers("completions") == ["best_of", "logprobs", "max_tokens", "n", "seed"]
    assert integers("responses") == ["max_output_tokens", "max_tool_calls", "top_logprobs"]


def test_ids_of_prompts_and_own_fields_may_be_whole_floats():
    body = parsed("completions", prompt=[65.0, 66], stop_token_ids=[7.0], top_k=3.0, priority=-2.0)
    assert (body.prompt, body.stop_token_ids, body.top_k, body.priority) == ([65, 66], [7], 3, -2)
    assert parsed("completions", prompt=[[65.0], [1e1]]).prompt == [[65], [10]]
    with pytest.raises(RequestError) as caught:
        parsed("completions", prompt=[65.5])
    assert caught.value.param == "prompt.0"


class Template:
    """What a tokenizer tells of its template."""

    def __init__(self, *variables, think=None):
        self.template_variables, self.dialect, self.think = frozenset(variables), self, think


def variables(template, **asked):
    return told(template, ChatInput([Message(role="user", content="x")], **asked)).variables or {}


@pytest.mark.parametrize("effort", EFFORTS)
def test_templates_are_told_what_they_read(effort):
    assert variables(Template(), effort=effort) == {}
    is_on = effort != "none"
    assert variables(Template("enable_thinking", think=("a", "b")), effort=effort) == {"enable_thinking": is_on}
    assert variables(Template("thinking", "reasoning_effort"), effort=effort) == {
        "thinking": is_on,
        "reasoning_effort": effort,
    }
    own = {"enable_thinking": not is_on}
    assert variables(Template("enable_thinking"), effort=effort, variables=own) == own
    if is_on:
        assert variables(Template(think=("a", "b")), effort=effort) == {}
    else:
        with pytest.raises(UnsupportedParameter) as caught:
            variables(Template(think=("a", "b")), effort=effort)
        assert caught.value.param == "reasoning_effort"


def test_verbosity_is_told_where_it_is_read():
    assert variables(Template("verbosity"), verbosity="low") == {"verbosity": "low"}
    assert variables(Template("enable_thinking"), verbosity="low") == {}
    assert variables(Template("verbosity")) == {}


# bodies as these clients make them by themselves, for a model that they take for one that reasons
HABITS = {
    "codex": ("responses", {
        "instructions": "You are a coding agent.", "tools": [FUNCTION], "tool_choice": "auto",
        "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"}, "store": False,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0199a213-81c0-7800-8aa1-bbab2a035a53",
        "text": {"verbosity": "medium"},
    }),
    "ai sdk": ("responses", {
        "store": False, "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"}, "service_tier": "flex", "max_tool_calls": 10,
        "prompt_cache_retention": "24h", "truncation": "disabled",
    }),
    "openai-agents": ("responses", {
        "include": [], "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"},
        "parallel_tool_calls": False, "store": True, "metadata": {"trace": "1"},
    }),
    "ai sdk, chat": ("chat", {
        "reasoning_effort": "high", "verbosity": "low", "store": False, "service_tier": "priority",
        "prompt_cache_key": "k", "prediction": {"type": "content", "content": "x"}, "user": "u",
    }),
}  # fmt: skip


@pytest.mark.parametrize("client", HABITS)
def test_habits_of_clients_are_answered(live, client):
    api, body = HABITS[client]
    limit = "max_output_tokens" if api == "responses" else "max_tokens"
    answer = live.http.post(PATHS[api], json={"model": NAME, **APIS[api][2], **body, limit: 4})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if "service_tier" in body or api == "responses":
        assert found["service_tier"] == "default"
    if api == "responses":
        assert found["reasoning"]["effort"] == body["reasoning"]["effort"]
        assert found["text"]["verbosity"] == body["text"]["verbosity"]
        assert found["max_tool_calls"] == body.get("max_tool_calls")


def test_effort_reaches_the_prompt():
    with start(EngineConfig(kv_cache_memory=2**28, max_model_len=512), files={"chat_template": HERMES}) as server:

        def length(path, **changes):
            answer = server.http.post(path, json=changes)
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            return usage.get("prompt_tokens") or usage["input_tokens"]

        chat, responses = ({"messages": HI, "max_tokens": 1}, {"input": "x", "max_output_tokens": 1})
        plain, thinks = (length(PATHS["chat"], **chat, reasoning_effort=effort) for effort in ("none", "low"))
        assert plain < thinks
        assert thinks == length(PATHS["chat"], **chat, chat_template_kwargs={"thinking": True})
        assert plain == length(PATHS["chat"], **chat)
        for effort, expected in (("none", plain), ("high", thinks)):
            assert length(PATHS["responses"], **responses, reasoning={"effort": effort}) == expected
    with start(EngineConfig(kv_cache_memory=2**28, max_model_len=512),
               files={"chat_template": HERMES.replace("if thinking", "if true")}) as server:  # fmt: skip
        for path, body, name in (
            (PATHS["chat"], {**chat, "reasoning_effort": "none"}, "reasoning_effort"),
            (PATHS["responses"], {**responses, "reasoning": {"effort": "none"}}, "reasoning.effort"),
        ):
            answer = server.http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
