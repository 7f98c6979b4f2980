"""Answers and events are what openai-python's own types say, checked by its strict validation."""

import openai
import pytest

from tests.server.conftest import NAME

MESSAGES = [{"role": "user", "content": "The code of the archive is 48213. What is it?"}]
TOOL = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def strict(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0, _strict_response_validation=True) as made:
        yield made


CHATS = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "choices": {"n": 2, "seed": 1, "temperature": 1.0},
    "tools": {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
    "json": {"response_format": {"type": "json_object"}},
    "stop": {"stop": ["48"]},
}
RESPONSES = {
    "plain": {},
    "tools": {"tools": [{"type": "function", **TOOL}], "tool_choice": "required"},
    "not stored": {"store": False},
    "conversation": {"conversation": "strict"},
}


@pytest.mark.parametrize("name", CHATS)
def test_chat(strict, name):
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 20, "temperature": 0, **CHATS[name]}
    assert strict.chat.completions.create(**body).choices
    chunks = list(strict.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.total_tokens


@pytest.mark.parametrize("changes", [{"echo": True}, {"logprobs": 2}, {"n": 2, "temperature": 1.0, "seed": 1}])
def test_completions(strict, changes):
    """Whole: of a stream's chunks the types say that each has a finish reason, which OpenAI's have not either."""
    assert strict.completions.create(**{"model": NAME, "prompt": "The river", "max_tokens": 5, **changes}).choices


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(strict, name):
    body = {
        "model": NAME,
        "input": MESSAGES[0]["content"],
        "max_output_tokens": 20,
        "temperature": 0,
        **RESPONSES[name],
    }
    made = strict.responses.create(**body)
    assert made.usage.total_tokens
    events = list(strict.responses.create(**body, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    if name == "plain":
        assert strict.responses.retrieve(made.id).id == made.id
        strict.responses.delete(made.id)


def test_models(strict):
    assert [model.id for model in strict.models.list()] == [NAME]
    assert strict.models.retrieve(NAME).id == NAME
