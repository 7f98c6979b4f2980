"""Body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.grammar import Grammar
from pacellm.types import SamplingParams
from server.schema.base import RESPONSE_PREFIX, SESSION_ID, Strict, parse, refuse_unless_neutral
from server.schema.chat import Metadata
from server.schema.formats import TextFormat
from server.schema.sampling import GenerationFields


class InputPart(Strict):
    """A part of a message; an answer's part may be sent back as it came."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Strict):
    """A message; an answer's output item may be sent back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(min_length=1, max_length=4096)]
    # without effect on the result by their nature
    id: Annotated[str, Field(max_length=512)] | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ConversationId(Strict):
    """A conversation by its id."""

    id: Annotated[str, Field(pattern=SESSION_ID)]


class TextOptions(Strict):
    """What the text is to be like."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Strict):
    """Streams are not padded."""

    include_obfuscation: Literal[False] | None = None


# Accepted where the value means "as usual"; anything else would change the result and is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "background": (False,),
    "include": ([],),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
}


class ResponseRequest(GenerationFields):
    """Something new to say, alone or behind what was said before."""

    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=16_384)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    store: bool = True
    previous_response_id: Annotated[str, Field(max_length=512)] | None = None
    conversation: Annotated[str, Field(pattern=SESSION_ID)] | ConversationId | None = None
    text: TextOptions | None = None
    stream_options: ResponseStreamOptions | None = None
    # without effect on the result by their nature
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    parallel_tool_calls: bool | None = None
    # accepted only with their neutral value
    tools: Any = None
    tool_choice: Any = None
    background: Any = None
    include: Any = None
    truncation: Any = None
    top_logprobs: Any = None
    reasoning: Any = None

    @property
    def conversation_id(self) -> str | None:
        """The conversation that it belongs to."""
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    def messages(self) -> list[dict[str, str]]:
        """The new messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [{"role": message.role, "content": message.text()} for message in self.input]

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


def parse_response(body: bytes) -> ResponseRequest:
    """A checked request.

    Raises:
        RequestError: names the field.
    """
    request = parse(ResponseRequest, body)
    refuse_unless_neutral(request, NEUTRAL)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    if request.previous_response_id is not None and request.conversation is not None:
        raise RequestError(
            "previous_response_id and conversation exclude each other", param="previous_response_id",
            code="mutually_exclusive_parameters",
        )  # fmt: skip
    if (request.conversation_id or "").startswith(RESPONSE_PREFIX):
        raise RequestError("a stored response is no conversation; send previous_response_id", param="conversation",
                           code="invalid_value")  # fmt: skip
    if request.store and not request.pacellm.commit:
        raise RequestError("a response that is stored is committed; send store: false", param="pacellm.commit",
                           code="invalid_value")  # fmt: skip
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        raise UnsupportedParameter("text.verbosity is not supported here with this value", param="text.verbosity")
    return request
