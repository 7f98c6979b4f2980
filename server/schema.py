"""Request bodies, checked strictly: an unknown field is an error, never dropped."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.types import PAMode, SamplingParams

SESSION_ID = r"^[A-Za-z0-9._:-]{1,256}$"


class Strict(BaseModel):
    """No conversions between types and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """What the stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class PaceOptions(Strict):
    """How this request uses its session's banks."""

    pa: PAMode | None = None
    commit: bool = True


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


# Accepted where the value means "as usual"; anything else would change the result and is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "continue_final_message": (False,),
    "echo": (False,),
}


class ChatCompletionRequest(Strict):
    """Body of POST /v1/chat/completions."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    session_id: Annotated[str, Field(pattern=SESSION_ID)] | None = None
    return_progress: bool = False
    pacellm: PaceOptions = PaceOptions()
    # without effect on the result by their nature
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    # accepted only with their neutral value
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    continue_final_message: Any = None
    echo: Any = None

    def sampling(self) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: a value out of range, or two that contradict each other.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            "stop": None if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else frozenset(self.stop_token_ids),
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
        }
        return SamplingParams(
            ignore_eos=self.ignore_eos, **{name: value for name, value in given.items() if value is not None}
        )


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """A checked request.

    Raises:
        RequestError: names the field.
    """
    try:
        request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from None
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and not any(type(value) is type(usual) and value == usual for usual in neutral):
            raise UnsupportedParameter(f"{name} is not supported here", param=name)
    return request


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), bias) for token, bias in given.items())
    except ValueError:
        raise RequestError("logit_bias is keyed by token ids", param="logit_bias", code="invalid_value") from None


def _places(problem: Any) -> list[str]:
    """The fields on the way to a problem; a union's branches are part of the location, but no fields."""
    return [str(place) for place in problem["loc"] if "[" not in str(place) and place not in ("str", "TextPart")]


def _most_telling(problems: list[Any]) -> Any:
    """Of the first wrong field's problems, one for each branch of a union, the one of the branch that fits furthest."""
    location = problems[0]["loc"]
    field = location[: 3 if location[:1] == ("messages",) else 1]
    return max((p for p in problems if p["loc"][: len(field)] == field), key=lambda p: len(_places(p)))


def _request_error(error: ValidationError) -> RequestError:
    """The first problem, in OpenAI's form."""
    first = _most_telling(error.errors(include_url=False, include_context=False))
    param = ".".join(_places(first)) or None
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return UnsupportedParameter(f"{param} is not a parameter of this endpoint", param=param)
    if first["type"] == "too_short" and param == "messages":
        return RequestError("messages must have at least one message", param="messages", code="invalid_value")
    return RequestError(f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value")
