"""openai-python against a running server: ``pytest load_tests/compat/test_openai.py``, see docs/compatibility.md."""

import json
import uuid
from typing import Literal

import openai
import pytest
from conftest import FACT, KEY, URL
from pydantic import BaseModel, ConfigDict

MODEL = "pacellm-demo"


class Fruit(BaseModel):
    """A form for an answer."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["apple", "pear"]
    ripe: bool


class Weather(BaseModel):
    """The weather in a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Oslo", "Rome"]


@pytest.fixture
def client():
    with openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client, question):
    answer = client.chat.completions.create(model=MODEL, messages=question)
    assert "48213" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_raw_response(client, question):
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=question)
    assert raw.headers["x-request-id"]
    assert raw.parse()._request_id == raw.headers["x-request-id"]


def test_chat_create_stream(client, question):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=question, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "48213" in text
    assert chunks[-1].usage.completion_tokens > 0


def test_chat_stream_helper(client, question):
    with client.chat.completions.stream(model=MODEL, messages=question) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert "48213" in final.choices[0].message.content


def test_chat_logprobs_and_choices(client, question):
    answer = client.chat.completions.create(
        model=MODEL, messages=question, n=2, seed=1, logprobs=True, top_logprobs=3, max_tokens=4
    )
    assert len(answer.choices) == 2
    assert all(len(one.top_logprobs) == 3 for one in answer.choices[0].logprobs.content)


def test_tools_required(client, question, weather_tool):
    answer = client.chat.completions.create(
        model=MODEL, messages=question, tools=[weather_tool], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    messages = [
        *question,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    after = client.chat.completions.create(model=MODEL, messages=messages, tools=[weather_tool], tool_choice="none")
    assert after.choices[0].message.tool_calls is None


def test_tools_stream_helper(client, question):
    with client.chat.completions.stream(
        model=MODEL,
        messages=question,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert isinstance(call.function.parsed_arguments, Weather)


def test_tools_auto(client, question, weather_tool):
    for tools in ([weather_tool], []):
        answer = client.chat.completions.create(model=MODEL, messages=question, tools=tools, max_tokens=60)
        message = answer.choices[0].message
        assert bool(message.content) != bool(message.tool_calls)
        assert "<" not in (message.content or "")


def test_chat_parse(client, question):
    answer = client.chat.completions.parse(model=MODEL, messages=question, response_format=Fruit)
    assert isinstance(answer.choices[0].message.parsed, Fruit)


def test_chat_parse_stream(client, question):
    with client.chat.completions.stream(model=MODEL, messages=question, response_format=Fruit) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Fruit)


def test_json_object(client, question):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=question,
        response_format={"type": "json_object"},
        logit_bias={"7": 30, "98": 15, "17": -30},  # " } and the comma: the bundled model seldom ends by itself
        max_tokens=100,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt=[FACT, "The"], max_tokens=4, logprobs=1, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith(FACT)
    assert len(answer.choices[1].logprobs.tokens) == len(answer.choices[1].logprobs.token_logprobs)


def test_completions_stream(client):
    chunks = list(client.completions.create(model=MODEL, prompt=FACT, max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_responses(client):
    first = client.responses.create(model=MODEL, input=FACT)
    assert "48213" in first.output_text
    assert first.status == "completed"
    second = client.responses.create(
        model=MODEL, input="What is the access code of the amber archive?", previous_response_id=first.id
    )
    assert "48213" in second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_responses_create_stream(client):
    kinds = [event.type for event in client.responses.create(model=MODEL, input=FACT, stream=True)]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_responses_stream_helper(client):
    with client.responses.stream(model=MODEL, input=FACT) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text
    assert "48213" in text


def test_responses_parse(client):
    assert isinstance(client.responses.parse(model=MODEL, input=FACT, text_format=Fruit).output_parsed, Fruit)


def test_responses_tools(client, weather_tool):
    tool = {"type": "function", **weather_tool["function"]}
    answer = client.responses.create(
        model=MODEL, input=FACT, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=150
    )
    assert answer.output[0].type == "function_call"


def test_bad_request(client, question):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=question, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=question, extra_body={"nonsense": 1})
    assert caught.value.code == "unsupported_parameter"


def test_not_found(client, question):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="another", messages=question)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="text")


def test_authentication(question):
    with (
        openai.OpenAI(base_url=URL, api_key="a-wrong-key", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=question)
    assert caught.value.code == "invalid_api_key"


def test_client_timeout(client, question):
    document = question[0]["content"] + "\n\nNothing to see here." * 20_000
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": document}]
        )


async def _ask(question):
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=question, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_async_client(question):
    import asyncio

    assert "48213" in asyncio.run(_ask(question))


def test_forks_of_a_document_that_append(client):
    """Both by ``extra_body`` and by the client's own way to reach other endpoints."""
    name = f"compat-{uuid.uuid4().hex}"

    def send(text, session, append, **changes):
        extra = {"session_id": session, "pacellm": {"append": append}}
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **changes)

    send("The access code of the amber archive is 48213.", name, False, max_tokens=0)
    client.post(f"/sessions/{name}/fork", body={"session_id": f"{name}-1"}, cast_to=object)
    answer = send("What is the access code of the amber archive?", f"{name}-1", True)
    assert "48213" in answer.choices[0].message.content
    assert answer.model_extra["pacellm"]["dropped_tokens"] == 0
    with pytest.raises(openai.NotFoundError) as caught:
        send("And?", f"{name}-2", True)
    assert (caught.value.code, caught.value.param) == ("session_not_found", "session_id")
    for session in (name, f"{name}-1"):
        client.delete(f"/sessions/{session}", cast_to=object)
