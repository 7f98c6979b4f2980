"""What the Responses API refuses, and by which name."""

import pytest

from tests.server.respond import post

REFUSED = {
    "unknown": ({"inputs": "x"}, "inputs", "unsupported_parameter"),
    "max_tokens": ({"max_tokens": 5}, "max_tokens", "unsupported_parameter"),
    "session_id": ({"session_id": "s"}, "session_id", "unsupported_parameter"),
    "tools": ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    "item": ({"input": [{"type": "computer_call"}]}, "input.0.type", "invalid_value"),
    "result of nothing": (
        {"input": [{"type": "function_call_output", "call_id": "call_9", "output": "x"}]}, "input", "invalid_value",
    ),
    "tool schema": (
        {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": 5}}],
         "tool_choice": "required"}, "tools.0.parameters", None,
    ),
    "no object": ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools.0.parameters", None),
    "unknown tool": (
        {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice.name", "invalid_value",
    ),
    "truncation": ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
    "background": ({"background": True}, "background", "unsupported_parameter"),
    "include": ({"include": ["message.output_text.logprobs"]}, "include.0", "invalid_value"),
    "reasoning": ({"reasoning": {"effort": "little"}}, "reasoning.effort", "invalid_value"),
    "no schema": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "invalid_value"),
    "no name": ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "invalid_value"),
    "bad schema": (
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}},
        "text.format.schema",
        None,
    ),
    "schema of text": ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "invalid_value"),
    "verbosity": ({"text": {"verbosity": "some"}}, "text.verbosity", "invalid_value"),
    "empty input": ({"input": []}, "input", None),
    "no text": ({"input": 5}, "input", None),
    "role": ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", None),
    "image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.0.content.0.type",
        None,
    ),
    "temperature": ({"temperature": 3}, "temperature", "invalid_value"),
    "max_output_tokens": ({"max_output_tokens": -1}, "max_output_tokens", "invalid_value"),
    "too long": ({"max_output_tokens": 262_144}, "max_output_tokens", "context_length_exceeded"),
    "both": ({"previous_response_id": "a", "conversation": "b"}, "previous_response_id", None),
    "conversation": ({"conversation": "a b"}, "conversation", None),
    "reserved": ({"conversation": "resp_1"}, "conversation", None),
    "commit": ({"pacellm": {"commit": False}}, "pacellm.commit", None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_field(live, name):
    changes, param, code = REFUSED[name]
    answer = post(live, changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert code in (None, error["code"])


def test_unknown_responses_and_foreign_headers(live):
    answer = post(live, {"previous_response_id": "resp_none"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (
        404, "previous_response_id", "previous_response_not_found",
    )  # fmt: skip
    assert post(live, {"model": "gpt-9"}).json()["error"]["code"] == "model_not_found"
    assert post(live, {}, **{"X-Session-ID": "a"}).json()["error"]["param"] == "X-Session-ID"
    for path in ("responses/resp_none", "sessions/resp_none"):
        assert live.http.get(f"/v1/{path}").status_code == 404
