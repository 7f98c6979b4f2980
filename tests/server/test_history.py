"""Earlier turns as clients, models and other servers write them: none makes a conversation unanswerable."""

import re

import pytest

from pacellm.demo import MODEL_PATH
from pacellm.server.reading.messages import Message
from pacellm.server.reading.rendering import rendered_chat
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.conftest import NAME
from tests.server.respond import post
from tests.server.talk import HERMES, user

# as Qwen3-Coder's: arguments one by one
TAGGED = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>' + message.content -}}
{%- for call in message.tool_calls or [] %}{{- '<tool_call><function=' + call.function.name + '>' }}
{%- for key, value in call.function.arguments | items %}{{- '<parameter=' + key + '>' + value + '</parameter>' }}
{%- endfor %}{{- '</function></tool_call>' }}{% endfor -%}
{%- endfor -%}{{ tools }}{# "tool" #}"""
MALFORMED = [
    '{"city": "Os', "{", "[1, 2]", '"{\\"city\\": 1}"', "null", "7", "Oslo", '{"a": "\\ud83d"}', "[" * 5000, "{'a': 1}",
    '{"a": "<|end|>"', "1" * 5000, '{"a": 1} and more', "\\", '{"<|user|>": ',
]  # fmt: skip


def call(arguments, name="f"):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def rendered(template, *calls):
    tokenizer = ChatTokenizer(MODEL_PATH)
    if template is not None:
        tokenizer._tokenizer.chat_template = template
    result = {"role": "tool", "tool_call_id": "call_1", "content": "no"}
    talk = [*user("?"), {"role": "assistant", "tool_calls": list(calls)}, result]
    text = rendered_chat(tokenizer, [Message.model_validate(message) for message in talk], [])
    return re.sub("[\ufdd0-\ufdd3]", "", text)


@pytest.mark.parametrize("arguments", MALFORMED)
@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"),
        (TAGGED, "<tool_call><function=f><parameter=arguments>", "</parameter></function></tool_call>"),
        (None, '<tool_call>{"name": "f", "arguments": ', "}</tool_call>"),
    ],
    ids=["hermes", "tagged", "in words"],
)  # fmt: skip
def test_malformed_arguments_are_the_text_they_were(template, before, after, arguments):
    assert before + arguments + after in rendered(template, call(arguments))


@pytest.mark.parametrize("arguments", ["", "  ", "{}", None, {}])
def test_no_arguments_are_none(arguments):
    assert rendered(HERMES, call(arguments)) == rendered(HERMES, call("{}"))
    assert '"arguments": {}' in rendered(HERMES, call(arguments))


def test_several_calls_have_their_own_arguments():
    text = rendered(HERMES, call('{"a": 1'), call('{"b": 2}'), call("[3"), call({"c": "é"}))
    found = re.findall(r'"arguments": (.*?)}\n</tool_call>', text)
    assert found == ['{"a": 1', '{"b": 2}', "[3", '{"c": "é"}']


ANSWERS = {
    "nothing": {},
    "null": {"content": None},
    "no parts": {"content": []},
    "parts": {"content": [{"type": "text", "text": "a", "annotations": []}, {"type": "refusal", "refusal": "b"}]},
    "foreign parts": {"content": [{"type": "thinking", "thinking": "x", "signature": "y"}, {"type": "tool_use"}]},
    "reasoning": {"content": "x", "reasoning_content": "y", "reasoning": "y"},
    "foreign reasoning": {"content": "x", "reasoning": {"encrypted": "y"}, "reasoning_details": [{"type": "z"}]},
    "only reasoning": {"content": None, "reasoning_content": "y"},
    "parsed": {"content": '{"a": 1}', "parsed": {"a": 1}, "refusal": None, "audio": None, "function_call": None},
    "odd name": {"tool_calls": [call("{}", "get weather.x/é")]},
    "no type": {"tool_calls": [{"id": "call_1", "index": 0, "function": {"name": "f", "arguments": "{}"}}]},
    "many calls": {"tool_calls": [{**call("{}"), "id": f"call_{number}"} for number in range(200)]},
    "no calls": {"content": "x", "tool_calls": []},
    "cut": {"content": "", "tool_calls": [call('{"city": "Os')]},
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_any_kind_can_be_gone_on_from(live, name):
    body = {"messages": [*user("?"), {"role": "assistant", **ANSWERS[name]}, *user("And?")], "max_tokens": 1}
    answer = live.http.post("/v1/chat/completions", json={"model": NAME, **body})
    assert answer.status_code == 200, answer.text
    followed = {**body, "pacellm": {"append": True}, "session_id": f"appended-{name.replace(' ', '-')}"}
    first = {"model": NAME, "messages": user("?"), "max_tokens": 1, "session_id": followed["session_id"]}
    assert live.http.post("/v1/chat/completions", json=first).status_code == 200
    answer = live.http.post("/v1/chat/completions", json={"model": NAME, **followed, "messages": body["messages"][1:]})
    assert answer.status_code == 200, answer.text


ITEMS = {
    "annotations": {
        "type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": "final_answer",
        "content": [{"type": "output_text", "text": "a", "annotations": [{"type": "url_citation"}], "logprobs": [1],
                     "parsed": {"a": 1}}],
    },
    "refusal": {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    "nothing": {"type": "message", "role": "assistant", "content": []},
    "notes": {"role": "assistant", "content": "x", "type": "message", "provider_data": {"model": "y"}},
    "reasoning": {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}],
                  "encrypted_content": "abc", "content": None},
    "own reasoning": {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
    "cut": {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": '{"city": "Os',
            "status": "incomplete", "parsed_arguments": None, "namespace": "n", "caller": {"type": "direct"}},
    "no arguments": {"type": "function_call", "call_id": "call_1", "name": "odd name", "arguments": ""},
}  # fmt: skip


@pytest.mark.parametrize("name", ITEMS)
def test_an_item_of_any_kind_can_be_gone_on_from(live, name):
    talk = [{"role": "user", "content": "?"}, ITEMS[name]]
    if "call_id" in ITEMS[name]:
        talk.append({"type": "function_call_output", "call_id": "call_1", "output": "no", "name": "f", "caller": None})
    answer = post(live, {"input": [*talk, {"role": "user", "content": "And?"}], "max_output_tokens": 1})
    assert answer.status_code == 200, answer.text


def test_refusals_are_text(live):
    def count(content):
        answer = post(live, {"input": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]})
        return answer.json()["usage"]["input_tokens"]

    assert count([{"type": "refusal", "refusal": "I will not."}]) == count("I will not.") > count([])


def test_arguments_that_are_nested_too_deep_are_text():
    arguments = '{"a":' + "[" * 200 + "]" * 200 + "}"
    assert f'"arguments": {arguments}}}' in rendered(HERMES, call(arguments))
