"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pacellm.errors import RequestError
from pacellm.text.constraints import Grammar
from pacellm.types import SamplingParams

from ...reading.chat_input import ChatInput, Effort, Verbosity
from ...reading.messages import Message, check_messages
from ...reading.tools import MAX_TOOLS, NamedTool, Tool, ToolChoice, check_tools
from ...schema import WHOLE, parse, refuse_unless_neutral
from ..fields import SamplingFields
from ..formats import ResponseFormat, StructuredOutputs
from ..hints import HintFields, Prediction

# Accepted where the value means "as usual"; anything else would change the result and is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "moderation", "web_search_options"), ()),
}


class ChatCompletionRequest(SamplingFields, HintFields):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=16_384, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, bool | int | str], Field(max_length=16)] | None = None
    reasoning_effort: Effort | None = None
    verbosity: Verbosity | None = None
    # without effect on the result by their nature
    store: bool | None = None
    prediction: Prediction | None = None
    # accepted only with their neutral value
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    moderation: Any = None
    web_search_options: Any = None

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

    def chat_input(self) -> ChatInput:
        """What is to be answered.

        Raises:
            RequestError: the answer's form is said twice, or wrongly.
        """
        if self.structured_outputs is not None and self.choice != "none":
            message = "structured_outputs and tools exclude each other; tool_choice none lets both be there"
            raise RequestError(message, param="structured_outputs", code="invalid_value")
        return ChatInput(
            messages=self.messages,
            tools=self.tools or (),
            choice=self.choice,
            only_one=self.parallel_tool_calls is False,
            several=self.parallel_tool_calls is True,
            format=self.format(),
            n=self.n or 1,
            continues=self.continue_final_message,
            adds_prompt=not self.continue_final_message and self.add_generation_prompt is not False,
            variables=self.chat_template_kwargs,
            effort=self.reasoning_effort,
            verbosity=self.verbosity,
            is_truncated=self.truncate_prompt_tokens is not None,
            skip_special_tokens=self.skip_special_tokens,
            appends=self.pacellm.append,
        )

    def sampling(self) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: a value out of range, or two that contradict each other.
        """
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RequestError("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        return self.sampling_with(
            max_tokens=both[0] if both[1] is None else both[1],
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def parse_chat(body: bytes | bytearray) -> ChatCompletionRequest:
    """A checked request.

    Raises:
        RequestError: names the field.
    """
    request = parse(ChatCompletionRequest, body)
    refuse_unless_neutral(request, NEUTRAL)
    check_messages(request.messages, appends=request.pacellm.append)
    check_tools(request.tools or [], request.tool_choice)
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        if request.messages[-1].role != "assistant":
            raise RequestError("the message to continue must be the assistant's", param="continue_final_message")
    return request
