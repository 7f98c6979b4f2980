"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pacellm.errors import RequestError
from pacellm.grammar import Grammar
from pacellm.types import SamplingParams
from server.schema.base import Strict, parse, refuse_unless_neutral
from server.schema.formats import ResponseFormat, StructuredOutputs
from server.schema.sampling import SamplingFields
from server.schema.tools import MAX_TOOLS, NamedTool, Tool, ToolCall, ToolChoice, check_tools


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=4096)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def text(self) -> str:
        """The content as one string."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    def check(self, field: str) -> None:
        """Refuse what does not go with the role.

        Raises:
            RequestError: names the field, which begins with ``field``.
        """
        own = {"tool_calls": "assistant", "reasoning_content": "assistant", "reasoning": "assistant",
               "tool_call_id": "tool"}  # fmt: skip
        for name, role in own.items():
            if getattr(self, name) is not None and self.role != role:
                message = f"{field}.{name} goes with the role {role}"
                raise RequestError(message, param=f"{field}.{name}", code="invalid_value")
        if self.content is None and not self.tool_calls:
            raise RequestError(f"{field}.content is missing", param=f"{field}.content", code="invalid_value")
        if self.role == "tool" and self.tool_call_id is None:
            message = f"{field}.tool_call_id is missing: which call this is the result of"
            raise RequestError(message, param=f"{field}.tool_call_id", code="invalid_value")


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

# Accepted where the value means "as usual"; anything else would change the result and is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
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
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, bool | int | str], Field(max_length=16)] | None = None
    # without effect on the result by their nature
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    # accepted only with their neutral value
    functions: Any = None
    function_call: Any = None
    modalities: Any = None

    @property
    def choice(self) -> Literal["none", "auto", "required"] | NamedTool:
        """What is to be done with the tools."""
        return (self.tool_choice or "auto") if self.tools else "none"

    def format(self) -> Grammar | None:
        """What the answer must look like where it is no call.

        Raises:
            RequestError: it is said twice, or wrongly.
        """
        wanted = None if self.response_format is None else self.response_format.grammar()
        if self.structured_outputs is None:
            return wanted
        if wanted is not None:
            message = "structured_outputs and response_format exclude each other"
            raise RequestError(message, param="structured_outputs", code="invalid_value")
        return self.structured_outputs.grammar()

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


def check_messages(messages: list[Message]) -> None:
    """Refuse a conversation that does not fit together.

    Raises:
        RequestError: names the message and its field.
    """
    called: dict[str, str] = {}
    for number, message in enumerate(messages):
        message.check(f"messages.{number}")
        called |= {call.id: call.function.name for call in message.tool_calls or ()}
        if message.tool_call_id is not None and message.tool_call_id not in called:
            field = f"messages.{number}.tool_call_id"
            raise RequestError(f"{field} is of no call in an earlier message", param=field, code="invalid_value")


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """A checked request.

    Raises:
        RequestError: names the field.
    """
    request = parse(ChatCompletionRequest, body)
    refuse_unless_neutral(request, NEUTRAL)
    check_messages(request.messages)
    check_tools(request.tools or [], request.tool_choice)
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        if request.messages[-1].role != "assistant":
            raise RequestError("the message to continue must be the assistant's", param="continue_final_message")
    return request
