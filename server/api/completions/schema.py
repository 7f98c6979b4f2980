"""Body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.types import SamplingParams

from ...schema import WHOLE, parse, refuse_unless_neutral
from ..fields import SamplingFields
from ..formats import StructuredOutputs

_Token = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
_Tokens = Annotated[list[_Token], Field(min_length=1, fail_fast=True)]
MAX_PROMPTS = 128

NEUTRAL: dict[str, tuple[Any, ...]] = {"suffix": ("",)}


class CompletionRequest(SamplingFields):
    """Text to go on with: one prompt or several, as strings or token ids."""

    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    add_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    # accepted only with their neutral value
    best_of: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    suffix: Any = None

    def prompts(self) -> list[str | list[int]]:
        """Every prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def sampling(self) -> SamplingParams:
        """The engine's parameters; OpenAI's default of 16 tokens.

        Raises:
            RequestError: a value out of range.
        """
        return self.sampling_with(
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


def parse_completion(body: bytes | bytearray) -> CompletionRequest:
    """A checked request.

    Raises:
        RequestError: names the field.
    """
    request = parse(CompletionRequest, body)
    refuse_unless_neutral(request, NEUTRAL)
    if request.best_of not in (None, request.n or 1):
        raise UnsupportedParameter("best_of is not supported beyond n: all choices are answered", param="best_of")
    if request.echo and request.pacellm.append:
        raise RequestError("echo does not go with pacellm.append: the history stays where it is", param="echo",
                           code="invalid_value")  # fmt: skip
    return request
