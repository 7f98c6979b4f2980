"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pacellm.errors import RequestError
from pacellm.types import SamplingParams
from server.schema.base import Strict, parse, refuse_unless_neutral
from server.schema.sampling import SamplingFields


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=4096)]
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

# Accepted where the value means "as usual"; anything else would change the result and is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}


class ChatCompletionRequest(SamplingFields):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=16_384)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, bool | int | str], Field(max_length=16)] | None = None
    # without effect on the result by their nature
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    parallel_tool_calls: bool | None = None
    # accepted only with their neutral value
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None

    def sampling(self) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: a value out of range, or two that contradict each other.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RequestError("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        return self.sampling_with(
            max_tokens=both[0] if both[1] is None else both[1],
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """A checked request.

    Raises:
        RequestError: names the field.
    """
    request = parse(ChatCompletionRequest, body)
    refuse_unless_neutral(request, NEUTRAL)
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        if request.messages[-1].role != "assistant":
            raise RequestError("the message to continue must be the assistant's", param="continue_final_message")
    return request
