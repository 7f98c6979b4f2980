"""What can never run is refused before it is queued."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pacellm.errors import ConfigError, RequestError
from pacellm.experts.forward import check_density
from pacellm.types import GenerationRequest

if TYPE_CHECKING:
    from pacellm.engine.engine import Engine


def check(request: GenerationRequest, engine: Engine) -> GenerationRequest:
    """The request, its prompt as an array. Touches nothing of the engine, so any thread may call it.

    Raises:
        RequestError: names the field.
    """
    engine.scheduler.check(len(request.prompt), request.sampling.max_tokens)
    if not 1 <= request.n <= engine.config.max_num_seqs:
        raise RequestError(f"n must be 1 to {engine.config.max_num_seqs} here, not {request.n}", param="n")
    if request.sampling.prompt_logprobs is not None and request.session is not None:
        raise RequestError("log-probabilities of a prompt are not available in a session", param="echo")
    if request.append is not None and request.session is None:
        raise RequestError("there is no session to append to; name one", param="pacellm.append", code="invalid_value")
    if request.constraint is not None and request.sampling.ignore_eos:
        raise RequestError("ignore_eos contradicts a constrained answer", param="ignore_eos", code="invalid_value")
    if request.pa not in ("on", "read_only", "off") and not engine.config.pa:
        raise RequestError(f"pa {request.pa} needs banks; this engine has none", param="pacellm.pa")
    _check_experts(request, engine)
    vocabulary = engine.model.vocab_size
    for token, _ in request.sampling.logit_bias:
        if token >= vocabulary:
            raise RequestError(
                f"logit_bias names token {token}; the vocabulary has {vocabulary} tokens", param="logit_bias"
            )
    prompt = _ids(request.prompt, vocabulary)
    if prompt is None:
        raise RequestError(f"the prompt has a token outside the vocabulary of {vocabulary}", param="messages")
    return dataclasses.replace(request, prompt=prompt, is_checked=True)


def _ids(prompt: Iterable[int], vocabulary: int) -> array[int] | None:
    """None where one is outside the vocabulary."""
    try:
        ids = array("i", prompt)
    except OverflowError:
        return None
    numbers = np.frombuffer(ids, dtype=np.int32)
    return ids if numbers.min() >= 0 and numbers.max() < vocabulary else None


def _check_experts(request: GenerationRequest, engine: Engine) -> None:
    try:
        check_density(request.ce_density, engine.model.module, engine.model.layout, "pacellm.ce_density")
    except ConfigError as error:
        raise RequestError(str(error), param=error.param) from None
    if request.experts and (engine.pool is None or engine.pool.experts is None):
        raise RequestError(
            "expert activity needs a layout for a model with gated FFNs; serve with --ce-layout FILE",
            param="pacellm.experts",
        )
