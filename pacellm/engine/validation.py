"""What can never run is refused before it is queued."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable

import numpy as np

from pacellm.config import EngineConfig
from pacellm.errors import ConfigError, ContextLengthExceeded, RequestError
from pacellm.experts.forward import check_density
from pacellm.memory.pool import BankPool
from pacellm.model.load import LoadedModel
from pacellm.types import GenerationRequest, SamplingParams


class RequestValidator:
    """Checks requests. Touches nothing, so any thread may call it.

    Args:
        model: that is served.
        config: resolved.
        pool: of banks; None without PA.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig, pool: BankPool | None) -> None:
        self._model, self._config = model, config
        self._counts_experts = pool is not None and pool.experts is not None

    def check(self, request: GenerationRequest) -> GenerationRequest:
        """The request, its prompt as an array.

        Raises:
            RequestError: names the field.
        """
        self._check_memory(request)
        tokens_to_generate(len(request.prompt), request.sampling.max_tokens, limit_of(request, self._config))
        if not 1 <= request.n <= self._config.max_num_seqs:
            raise RequestError(f"n must be 1 to {self._config.max_num_seqs} here, not {request.n}", param="n")
        _check_combination(request)
        if request.pa not in ("on", "read_only", "off") and not self._config.pa:
            raise RequestError(f"pa {request.pa} needs banks; this engine has none", param="pacellm.pa")
        self._check_experts(request)
        _check_bias(request.sampling, self._model.vocab_size)
        prompt = _ids(request.prompt, self._model.vocab_size)
        return dataclasses.replace(request, prompt=prompt, is_checked=True)

    def _check_memory(self, request: GenerationRequest) -> None:
        budget = self._config.working_memory
        if budget is None:
            if request.memory == "on":
                raise RequestError("this server has no working memory; start it with --working-memory TOKENS",
                                   param="pacellm.memory", code="unsupported_parameter")  # fmt: skip
            return
        if request.sampling.prompt_logprobs is not None and len(request.prompt) > budget:
            raise RequestError(
                f"log-probabilities of a prompt are there up to {budget:,} tokens, and this one has "
                f"{len(request.prompt):,}: what lies beyond is not seen all at once",
                param="echo", code="unsupported_parameter",
            )  # fmt: skip

    def _check_experts(self, request: GenerationRequest) -> None:
        try:
            check_density(request.ce_density, self._model.module, self._model.layout, "pacellm.ce_density")
        except ConfigError as error:
            raise RequestError(str(error), param=error.param) from None
        if request.experts and not self._counts_experts:
            raise RequestError(
                "expert activity needs a layout for a model with gated FFNs; serve with --ce-layout FILE",
                param="pacellm.experts",
            )


def limit_of(request: GenerationRequest, config: EngineConfig) -> int:
    """Tokens of a request's context, prompt and answer together."""
    if request.memory == "off" and config.working_memory is not None:
        return config.working_memory
    return config.max_model_len or 0


def tokens_to_generate(prompt_tokens: int, max_tokens: int | None, limit: int, most: int | None = None) -> int:
    """How many tokens may be generated.

    Args:
        limit: of the context, prompt and answer together.
        most: where the request does not say; None is all that is left.

    Raises:
        RequestError: no prompt, a prompt (with max_tokens) longer than the context.
    """
    if prompt_tokens < 1:
        raise RequestError("the prompt has no tokens", param="messages")
    room = limit - prompt_tokens
    if room < (0 if max_tokens == 0 else 1):
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens:,} tokens; this model's context is {limit:,} tokens, "
            "prompt and answer together",
            param="messages",
        )
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthExceeded(
            f"max_tokens {max_tokens:,} with a prompt of {prompt_tokens:,} tokens is over this model's context "
            f"of {limit:,} tokens; at most {room:,} are left",
            param="max_tokens",
        )
    if max_tokens is not None:
        return max_tokens
    return room if most is None else min(room, most)


def _check_combination(request: GenerationRequest) -> None:
    if request.sampling.prompt_logprobs is not None and request.session is not None:
        raise RequestError("log-probabilities of a prompt are not available in a session", param="echo")
    if request.append is not None and request.session is None:
        raise RequestError("there is no session to append to; name one", param="pacellm.append", code="invalid_value")
    if request.constraint is not None and request.sampling.ignore_eos:
        raise RequestError("ignore_eos contradicts a constrained answer", param="ignore_eos", code="invalid_value")


def _check_bias(sampling: SamplingParams, vocabulary: int) -> None:
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise RequestError(
                f"logit_bias names token {token}; the vocabulary has {vocabulary} tokens", param="logit_bias"
            )


def _ids(prompt: Iterable[int], vocabulary: int) -> array[int]:
    refused = RequestError(f"the prompt has a token outside the vocabulary of {vocabulary}", param="messages")
    try:
        ids = array("i", prompt)
    except OverflowError:
        raise refused from None
    numbers = np.frombuffer(ids, dtype=np.int32)
    if numbers.min() < 0 or numbers.max() >= vocabulary:
        raise refused
    return ids
