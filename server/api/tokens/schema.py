"""Bodies of POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...reading.messages import Message, check_messages
from ...reading.tools import MAX_TOOLS, Tool, check_tools
from ...schema import WHOLE, Strict, parse


class TokenizeRequest(Strict):
    """Text, or a conversation, to ids."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=16_384, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Ids to text."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31), WHOLE]], Field(fail_fast=True)]


def parse_tokenize(body: bytes | bytearray) -> TokenizeRequest:
    """A checked request."""
    request = parse(TokenizeRequest, body)
    check_messages(request.messages or [])
    check_tools(request.tools or [], None)
    return request


def parse_detokenize(body: bytes | bytearray) -> DetokenizeRequest:
    """A checked request."""
    return parse(DetokenizeRequest, body)
