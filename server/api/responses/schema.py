"""Body of POST /v1/responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.text.constraints import Grammar
from pacellm.types import SamplingParams

from ...reading.chat_input import ChatInput, Choice, Effort, Verbosity
from ...reading.messages import Message, check_messages
from ...reading.tools import MAX_TOOLS, Tool, check_tools
from ...schema import RESPONSE_PREFIX, SESSION_ID, WHOLE, Strict, parse, refuse_unless_neutral
from ..fields import GenerationFields
from ..formats import TextFormat
from ..hints import HintFields
from .input_items import (
    AnswerMessage,
    CallOutputItem,
    InputItem,
    InputMessage,
    ResponseNamedTool,
    ResponseTool,
    messages_of,
    resolved,
)


class ConversationId(Strict):
    """A conversation by its id."""

    id: Annotated[str, Field(pattern=SESSION_ID)]


class TextOptions(Strict):
    """What the text is to be like."""

    format: TextFormat | None = None
    verbosity: Verbosity | None = None


class ReasoningOptions(Strict):
    """How much is thought. What was is told in full, so nothing sums it up."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Strict):
    """Streams are not padded."""

    include_obfuscation: Literal[False] | None = None


# Accepted where the value means "as usual"; anything else would change the result and is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    **dict.fromkeys(
        ("access_programs", "background_options", "context_management", "image", "moderation", "prompt"), ()
    ),
}
# what there is none of is left out, and reasoning is told as it is, not encrypted
Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]


class ResponseRequest(GenerationFields, HintFields):
    """Something new to say, alone or behind what was said before."""

    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=16_384, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    store: bool | None = None
    previous_response_id: Annotated[str, Field(max_length=512)] | None = None
    conversation: Annotated[str, Field(pattern=SESSION_ID)] | ConversationId | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    reasoning: ReasoningOptions | None = None
    # without effect on the result by their nature
    include: Annotated[list[Includable], Field(max_length=64)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None  # of built-in tools: there are none
    # accepted only with their neutral value
    background: Any = None
    truncation: Any = None
    top_logprobs: Annotated[int, WHOLE] | None = None
    access_programs: Any = None
    background_options: Any = None
    context_management: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None

    @property
    def is_stored(self) -> bool:
        """The response can be gone on from: OpenAI's default."""
        return self.store is not False

    @property
    def conversation_id(self) -> str | None:
        """The conversation that it belongs to."""
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    def messages(self, item: Callable[[str], dict[str, Any] | None]) -> list[dict[str, Any]]:
        """The new messages, as chat has them.

        Args:
            item: finds an item of a stored response by its id.

        Raises:
            NotFound: an item that is referred to is not kept.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(resolved(self.input, item))

    def texts(self) -> list[str]:
        """Of the items of its input, empty where one has none; a text is one item."""
        if isinstance(self.input, str):
            return [self.input]
        spoken = (InputMessage, AnswerMessage, CallOutputItem)
        return [item.text() if isinstance(item, spoken) else "" for item in self.input]

    def chat_input(self, messages: Sequence[dict[str, Any]]) -> ChatInput:
        """What is to be answered.

        Args:
            messages: of the whole conversation.

        Raises:
            RequestError: they do not fit together, or the answer's form is said wrongly.
        """
        said = [Message.model_validate(message) for message in messages]
        check_messages(said)
        return ChatInput(
            messages=said,
            tools=self.functions(),
            choice=self.choice,
            only_one=self.parallel_tool_calls is False,
            several=self.parallel_tool_calls is True,
            format=self.format(),
            effort=None if self.reasoning is None else self.reasoning.effort,
            verbosity=None if self.text is None else self.text.verbosity,
        )

    def functions(self) -> list[Tool]:
        """Those that may be called, as chat has them."""
        return [tool.tool() for tool in self.tools or ()]

    @property
    def choice(self) -> Choice:
        """What is to be done with the functions."""
        named = self.tool_choice.named() if isinstance(self.tool_choice, ResponseNamedTool) else self.tool_choice
        return (named or "auto") if self.tools else "none"

    def format(self) -> Grammar | None:
        """What the answer must look like.

        Raises:
            RequestError: it is said wrongly.
        """
        return None if self.text is None or self.text.format is None else self.text.format.grammar()

    def sampling(self) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: a value out of range.
        """
        return self.params(max_tokens=self.max_output_tokens)


def parse_response(body: bytes | bytearray) -> ResponseRequest:
    """A checked request.

    Raises:
        RequestError: names the field.
    """
    request = parse(ResponseRequest, body)
    refuse_unless_neutral(request, NEUTRAL)
    named = request.tool_choice
    check_tools(request.functions(), named.named() if isinstance(named, ResponseNamedTool) else named, inner="")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    _check_state(request)
    return request


def _check_state(request: ResponseRequest) -> None:
    """Refuse what contradicts itself about what is gone on from, and what is kept."""
    if request.previous_response_id is not None and request.conversation is not None:
        raise RequestError(
            "previous_response_id and conversation exclude each other", param="previous_response_id",
            code="mutually_exclusive_parameters",
        )  # fmt: skip
    if (request.conversation_id or "").startswith(RESPONSE_PREFIX):
        raise RequestError("a stored response is no conversation; send previous_response_id", param="conversation",
                           code="invalid_value")  # fmt: skip
    if request.is_stored and not request.pacellm.commit:
        raise RequestError("a response that is stored is committed; send store: false", param="pacellm.commit",
                           code="invalid_value")  # fmt: skip
    if request.pacellm.append:
        raise UnsupportedParameter("conversation and previous_response_id append by themselves", param="pacellm.append")
