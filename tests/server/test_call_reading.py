"""Calls out of text, however it is cut; what a tokenizer's files say about them."""

import pytest

from pacellm.demo import MODEL_PATH
from pacellm.server.writing.tool_calls import ToolCallScanner
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.talk import function


def scan(pieces):
    scanner, calls = ToolCallScanner(), []
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
