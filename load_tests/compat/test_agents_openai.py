"""openai-python's loop of tools with ``auto``, written out: ``pytest load_tests/compat/test_agents_openai.py``."""

import json

import openai
import pytest
import weather_agent
from conftest import KEY, URL


@pytest.fixture
def client():
    weather_agent.asked.clear()
    with openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300) as client:
        yield client


def talk():
    return [
        {"role": "user", "content": weather_agent.QUESTION},
    ]


def results(message):
    return [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": weather_agent.get_weather(**json.loads(call.function.arguments)),
        }
        for call in message.tool_calls
    ]


def test_chat(client):
    messages = talk()
    for _ in range(3):
        options = {"model": weather_agent.MODEL, "tools": [weather_agent.TOOL], "temperature": 0, "max_tokens": 100}
        message = client.chat.completions.create(messages=messages, **options).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        messages += results(message)
    weather_agent.check(message.content)


def test_chat_streamed(client):
    messages, pieces = talk(), 0
    for _ in range(3):
        options = {"model": weather_agent.MODEL, "tools": [weather_agent.TOOL], "temperature": 0, "max_tokens": 100}
        with client.chat.completions.stream(messages=messages, **options) as stream:
            pieces += sum(event.type in ("content.delta", "tool_calls.function.arguments.delta") for event in stream)
            message = stream.get_final_completion().choices[0].message
        fields = {"id": True, "type": True, "function": {"name", "arguments"}}  # the helper adds some of its own
        calls = [call.model_dump(include=fields) for call in message.tool_calls or ()]
        messages.append({"role": "assistant", "content": message.content, "tool_calls": calls or None})
        if not message.tool_calls:
            break
        messages += results(message)
    weather_agent.check(message.content)
    assert pieces > 5


def test_responses(client):
    tools = [{"type": "function", **weather_agent.TOOL["function"]}]
    items, previous = [{"role": "user", "content": weather_agent.QUESTION}], None
    for _ in range(3):
        response = client.responses.create(
            model=weather_agent.MODEL, input=items, tools=tools, temperature=0,
            max_output_tokens=100, previous_response_id=previous,
        )  # fmt: skip
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        previous = response.id
        items = [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": weather_agent.get_weather(**json.loads(call.arguments)),
            }
            for call in calls
        ]
    weather_agent.check(response.output_text)
