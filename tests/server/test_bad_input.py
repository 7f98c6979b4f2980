"""Whatever is sent: a 4xx in OpenAI's form that names the field, and the server goes on."""

import json
import typing

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatFields
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionFields
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseFields

from pacellm.server.api.chat.schema import parse_chat
from pacellm.server.api.completions.schema import parse_completion
from pacellm.server.api.responses.schema import parse_response
from tests.server.conftest import NAME

HI = [{"role": "user", "content": "hi"}]


def body(**changes):
    return json.dumps({"model": NAME, "messages": HI, "max_tokens": 2, **changes}).encode()


CASES = {
    "empty messages": (body(messages=[]), 400, "messages", None),
    "no messages": (json.dumps({"model": NAME}).encode(), 400, "messages", None),
    "messages no list": (body(messages="hi"), 400, "messages", None),
    "unknown role": (body(messages=[{"role": "robot", "content": "x"}]), 400, "messages.0.role", None),
    "content no text": (body(messages=[{"role": "user", "content": 5}]), 400, "messages.0.content", None),
    "content null": (body(messages=[{"role": "user", "content": None}]), 400, "messages.0.content", None),
    "image": (
        body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        400,
        "messages.0.content.0.type",
        None,
    ),
    "temperature text": (body(temperature="hot"), 400, "temperature", None),
    "temperature negative": (body(temperature=-1), 400, "temperature", None),
    "temperature huge": (body(temperature=1e300), 400, "temperature", None),
    "temperature bool": (body(temperature=True), 400, "temperature", None),
    "temperature nan": (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, "temperature", None),
    "top_p zero": (body(top_p=0), 400, "top_p", None),
    "top_k": (body(top_k=-5), 400, "top_k", None),
    "max_tokens negative": (body(max_tokens=-1), 400, "max_tokens", None),
    "max_tokens huge": (body(max_tokens=10**30), 400, "max_tokens", None),
    "max_tokens beyond": (body(max_tokens=262144), 400, "max_tokens", "context_length_exceeded"),
    "max_tokens float": (body(max_tokens=1.5), 400, "max_tokens", None),
    "both max_tokens": (body(max_completion_tokens=7), 400, "max_tokens", None),
    "seed huge": (body(seed=2**70), 400, "seed", None),
    "penalty": (body(frequency_penalty=9), 400, "frequency_penalty", None),
    "stop numbers": (body(stop=[1]), 400, "stop.0", None),
    "stop empty": (body(stop=""), 400, "stop", None),
    "stop many": (body(stop=["x"] * 99), 400, "stop", None),
    "top_logprobs alone": (body(top_logprobs=3), 400, "top_logprobs", None),
    "top_logprobs many": (body(logprobs=True, top_logprobs=21), 400, "top_logprobs", None),
    "logit_bias key": (body(logit_bias={"x": 1}), 400, "logit_bias.x", None),
    "logit_bias token": (body(logit_bias={"99999": 1}), 400, "logit_bias", None),
    "session id": (body(session_id="a b"), 400, "session_id", None),
    "session id long": (body(session_id="a" * 257), 400, "session_id", None),
    "unknown field": (body(tempratur=1), 400, "tempratur", "unsupported_parameter"),
    "tool": (body(tools=[{"type": "function"}]), 400, "tools.0.function", None),
    "n huge": (body(n=10**9), 400, "n", None),
    "n over the seats": (body(n=100), 400, "n", None),
    "n zero": (body(n=0), 400, "n", None),
    "n true": (body(n=True), 400, "n", None),
    "format": (body(response_format={"type": "xml"}), 400, "response_format.type", None),
    "unknown mode": (body(pacellm={"pa": "maybe"}), 400, "pacellm.pa", None),
    "unknown model": (body(model="gpt-9"), 404, "model", "model_not_found"),
    "model no text": (body(model=7), 400, "model", None),
    "no json": (b"{", 400, None, "invalid_json"),
    "empty body": (b"", 400, None, "invalid_json"),
    "not utf-8": (b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', 400, None, "invalid_json"),
    "surrogate": (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400, None, None),
    "a list": (b"[]", 400, None, None),
    "deep": (b"[" * 100_000, 400, None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_the_field_named(live, name):
    sent, status, param, code = CASES[name]
    answer = live.http.post("/v1/chat/completions", content=sent)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"] == param
    assert code in (None, error["code"])


def test_a_prompt_longer_than_the_context(live):
    answer = live.http.post(
        "/v1/chat/completions", content=body(messages=[{"role": "user", "content": "a b " * 140_000}])
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "262,144" in error["message"]


def test_a_body_over_the_limit_declared_or_not(live):
    big = b" " * (2**20 + 1)

    def chunked():
        for _ in range(40):
            yield b" " * 2**15

    for content in (big, chunked()):
        answer = live.http.post("/v1/chat/completions", content=content)
        assert answer.status_code == 413
        assert "limit" in answer.json()["error"]["message"]


def test_session_named_twice(live):
    same = live.http.post("/v1/chat/completions", content=body(session_id="a"), headers={"X-Session-ID": "a"})
    assert same.status_code == 200
    other = live.http.post("/v1/chat/completions", content=body(session_id="a"), headers={"X-Session-ID": "b"})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "session_id")
    bad = live.http.post("/v1/chat/completions", content=body(), headers={"X-Session-ID": "a b"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "X-Session-ID")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/", 405),
        ("POST", "/nothing", 404),
    ],
)
def test_wrong_paths(live, method, path, status):
    answer = live.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_server_goes_on(live):
    assert live.http.post("/v1/chat/completions", content=body()).status_code == 200
    assert live.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "parse", "least"),
    [
        (ChatFields, parse_chat, {"messages": [{"role": "user", "content": "x"}]}),
        (CompletionFields, parse_completion, {"prompt": "x"}),
        (ResponseFields, parse_response, {"input": "x"}),
    ],
)
def test_null_is_absent(fields, parse, least):
    """For every field that openai-python knows."""
    names = typing.get_type_hints(fields).keys() - least.keys()
    assert len(names) > 12
    parsed = parse(json.dumps(least | dict.fromkeys(names)).encode())
    assert parsed.model_dump(exclude=names) == parse(json.dumps(least).encode()).model_dump(exclude=names)
