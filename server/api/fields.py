"""The fields that all generating endpoints share, vLLM's names beside OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pacellm.errors import RequestError
from pacellm.modes import PAChoice
from pacellm.types import SamplingParams

from ..schema import SESSION_ID, WHOLE, Strict

MAX_TIMEOUT = 86_400.0
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31), WHOLE]], Field(max_length=1024, fail_fast=True)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Strict):
    """What the stream carries besides text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class PaceOptions(Strict):
    """How this request uses its session, banks and experts, and what it reports on them."""

    pa: PAChoice | None = None
    commit: bool = True
    append: bool = False
    ce_density: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    experts: bool = False
    trace: bool = False
    memory: Literal["on", "off"] | None = None

    def engine_options(self) -> dict[str, Any]:
        """What the engine takes of it beside ``commit`` and ``append``."""
        return {
            "pa": self.pa or "on", "ce_density": self.ce_density, "experts": self.experts, "trace": self.trace,
            "memory": self.memory,
        }  # fmt: skip


class GenerationFields(Strict):
    """How to generate and how long to wait, wherever an answer is made."""

    model: Annotated[str, Field(max_length=512)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    ignore_eos: bool = False
    return_progress: bool = False
    priority: Annotated[int, Field(ge=-1000, le=1000), WHOLE] = 0
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    pacellm: PaceOptions = PaceOptions()
    # without effect on the result by its nature
    user: Annotated[str, Field(max_length=512)] | None = None

    def params(self, **changes: Any) -> SamplingParams:
        """The engine's parameters.

        Args:
            changes: what the endpoint itself decides; None leaves the default.

        Raises:
            RequestError: a value out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos")
        given = {**{name: getattr(self, name) for name in names}, **changes}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


class SamplingFields(GenerationFields):
    """What vLLM and OpenAI's older endpoints have beyond that, and which session to use."""

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[_TokenId, _Bias], Field(max_length=1024)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: _Ids | None = None
    skip_special_tokens: bool = True
    session_id: Annotated[str, Field(pattern=SESSION_ID)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None

    def wants_usage(self) -> bool:
        """A stream is to end with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    def sampling_with(self, **changes: Any) -> SamplingParams:
        """The engine's parameters.

        Args:
            changes: what the endpoint itself decides, as ``logprobs``; None leaves the default.

        Raises:
            RequestError: a value out of range.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
        biases = None if self.logit_bias is None else tuple((int(key), value) for key, value in self.logit_bias.items())
        given: dict[str, Any] = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_tokens,
            "stop": None if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else frozenset(self.stop_token_ids),
            "logit_bias": biases,
            "skip_special_tokens": self.skip_special_tokens,
        }
        return self.params(**{**given, **changes})
