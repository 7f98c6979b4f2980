"""litellm against a running server: ``pytest load_tests/compat/test_litellm.py``, see docs/compatibility.md."""

import asyncio
import json

import litellm
import pytest
from conftest import FACT, KEY, URL

SERVER = {"model": "openai/pacellm-demo", "api_base": URL, "api_key": KEY, "num_retries": 0}
FORM = {
    "type": "object",
    "properties": {"kind": {"enum": ["apple", "pear"]}, "ripe": {"type": "boolean"}},
    "required": ["kind", "ripe"],
    "additionalProperties": False,
}


def test_completion(question):
    answer = litellm.completion(**SERVER, messages=question)
    assert "48213" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_async_completion(question):
    answer = asyncio.run(litellm.acompletion(**SERVER, messages=question))
    assert "48213" in answer.choices[0].message.content


def test_stream(question):
    chunks = list(litellm.completion(**SERVER, messages=question, stream=True, stream_options={"include_usage": True}))
    assert "48213" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.usage.completion_tokens > 0


def test_tools_required(question, weather_tool):
    answer = litellm.completion(
        **SERVER, messages=question, tools=[weather_tool], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    messages = [
        *question,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    after = litellm.completion(**SERVER, messages=messages, tools=[weather_tool], tool_choice="none")
    assert after.choices[0].message.tool_calls is None


def test_tools_required_stream(question, weather_tool):
    chunks = list(
        litellm.completion(
            **SERVER,
            messages=question,
            tools=[weather_tool],
            tool_choice="required",
            parallel_tool_calls=False,
            stream=True,
        )
    )
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}


def test_json_schema(question):
    form = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": FORM, "strict": True}}
    answer = litellm.completion(**SERVER, messages=question, response_format=form)
    assert set(json.loads(answer.choices[0].message.content)) == {"kind", "ripe"}


def test_text_completion():
    answer = litellm.text_completion(
        **{**SERVER, "model": "text-completion-openai/pacellm-demo"}, prompt=FACT, max_tokens=4
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_responses():
    answer = litellm.responses(**{name: value for name, value in SERVER.items() if name != "num_retries"}, input=FACT)
    assert "48213" in answer.output[0].content[0].text


def test_own_fields_pass(question):
    answer = litellm.completion(**SERVER, messages=question, extra_body={"session_id": "litellm", "top_k": 1})
    assert "48213" in answer.choices[0].message.content


def test_errors(question, weather_tool):
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**SERVER, messages=question, temperature=3)
    choice = {"type": "function", "function": {"name": "another"}}
    with pytest.raises(litellm.BadRequestError, match="among the tools"):
        litellm.completion(**SERVER, messages=question, tools=[weather_tool], tool_choice=choice)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**SERVER, "model": "openai/another"}, messages=question)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**SERVER, "api_key": "a-wrong-key"}, messages=question)
