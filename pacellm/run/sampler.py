"""Logits to token ids. Each request's row is worked on alone, so batch mates cannot change what it gets.

Randomness is a function of the request's seed and the number of tokens it has generated: nothing else, so a
preempted request goes on with the same text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pacellm.transfer import to_device
from pacellm.types import SamplingParams, TokenLogprob

NOT_FINITE = "the model produced logits that are not finite"
_AT_ONCE = 16  # rows that are sorted together; each takes some 40 bytes of memory a token of the vocabulary


def sample(
    logits: Tensor,
    params: SamplingParams,
    prompt: array[int],
    generated: list[int],
    seed: int,
    allowed: np.ndarray | None = None,
) -> tuple[int, TokenLogprob | None]:
    """The next token of one request, and its log-probability where that was asked for.

    Args:
        logits: [V] float32, not changed.
        prompt: ids of the prompt, for the repetition penalty.
        generated: ids so far.
        seed: the request's own.
        allowed: [V] bool, the tokens that may be chosen, after penalties and bias; None: all.

    Raises:
        ValueError: logits that are not finite, or a logit_bias token outside the vocabulary.
    """
    if not torch.isfinite(logits).all():
        raise ValueError(NOT_FINITE)
    shaped = shape(logits, params, prompt, generated, allowed)
    token = int(choose(shaped[None], [params], [uniform(seed, len(generated))]))
    return token, None if params.logprobs is None else logprob(logits, token, params.logprobs)


def shape(
    logits: Tensor, params: SamplingParams, prompt: array[int], generated: list[int], allowed: np.ndarray | None
) -> Tensor:
    """[V] logits after penalties, bias and the constraint's mask; see :func:`sample`."""
    shaped = _bias(_penalise(logits, params, prompt, generated), params)
    if allowed is not None:
        shaped = shaped.masked_fill(to_device(~torch.from_numpy(allowed), shaped.device), -torch.inf)
    return shaped


def choose(logits: Tensor, params: Sequence[SamplingParams], points: Sequence[float]) -> Tensor:
    """[B] int64, a token of each row, without waiting for the device.

    Args:
        logits: [B, V] float32, shaped.
        params: of each row: temperature, top_k, top_p and min_p.
        points: of each row in [0, 1): where its distribution is cut.
    """
    tokens = logits.argmax(-1)
    drawn = [row for row, one in enumerate(params) if one.temperature]
    for start in range(0, len(drawn), _AT_ONCE):
        rows = drawn[start : start + _AT_ONCE]
        index = to_device(torch.tensor(rows), logits.device)
        tokens[index] = _draw(logits[index], [params[row] for row in rows], [points[row] for row in rows])
    return tokens


def _penalise(logits: Tensor, params: SamplingParams, prompt: array[int], generated: list[int]) -> Tensor:
    """OpenAI's presence and frequency penalties on what was generated; repetition (CTRL, arXiv 1909.05858) also on
    the prompt."""
    if params.repetition_penalty != 1.0:
        ids = np.unique(np.concatenate([np.asarray(prompt), np.array(generated, dtype=np.int32)]))
        seen = to_device(torch.from_numpy(ids).long(), logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(generated), return_counts=True)
        penalties = params.presence_penalty + params.frequency_penalty * torch.from_numpy(counts).to(logits.dtype)
        places, added = (to_device(one, logits.device) for one in (torch.from_numpy(ids), -penalties))
        logits = logits.index_add(0, places, added)
    return logits


def _bias(logits: Tensor, params: SamplingParams) -> Tensor:
    if not params.logit_bias:
        return logits
    tokens, biases = zip(*params.logit_bias, strict=True)
    if max(tokens) >= logits.shape[0]:
        raise ValueError(f"logit_bias names token {max(tokens)}; the vocabulary has {logits.shape[0]}")
    numbers = (torch.tensor(tokens), torch.tensor(biases, dtype=logits.dtype))
    places, added = (to_device(one, logits.device) for one in numbers)
    return logits.index_add(0, places, added)


def _draw(logits: Tensor, params: Sequence[SamplingParams], points: Sequence[float]) -> Tensor:
    """[B] tokens from the distributions that temperature, top_k, top_p and min_p leave of [B, V]."""
    size = logits.shape[-1]
    limits = [(one.temperature, one.top_k if one.top_k > 0 else size, one.top_p, one.min_p) for one in params]
    numbers = torch.tensor([(*own, point) for own, point in zip(limits, points, strict=True)], dtype=torch.float64)
    temperature, top_k, top_p, min_p, point = to_device(numbers, logits.device)[:, :, None].unbind(1)
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    places = torch.arange(size, device=logits.device)
    keep = (probabilities > 0) & (places < top_k) & (probabilities >= min_p * probabilities[:, :1])
    if any(one.top_p < 1.0 for one in params):
        keep &= (probabilities.cumsum(-1) - probabilities < top_p) | (top_p >= 1.0)
    cumulative = (probabilities * keep).cumsum(-1)
    place = torch.searchsorted(cumulative, point * cumulative[:, -1:], right=True)
    last = (places * keep).amax(-1, keepdim=True)
    return order.gather(-1, torch.minimum(place, last))[:, 0]


def uniform(seed: int, count: int) -> float:
    """A number in [0, 1) for the count-th token of a seed."""
    digest = hashlib.blake2b(f"{seed} {count}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """From the model's own distribution, before temperature and penalties."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top) if top else None
    alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else ()
    return TokenLogprob(token, float(logprobs[token]), alternatives)


def score(logits: Tensor, tokens: array[int], top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of known tokens.

    Args:
        logits: [N, V] float32, row i predicts ``tokens[i]``.
        top: how many alternatives to report for each.

    Raises:
        ValueError: logits that are not finite.
    """
    if not torch.isfinite(logits).all():
        raise ValueError(NOT_FINITE)
    logprobs = logits.log_softmax(-1)
    ids = torch.tensor(list(tokens), device=logits.device)
    values = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    best = logprobs.topk(top, dim=1)
    alternatives = (
        tuple(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return tuple(TokenLogprob(*one) for one in zip(tokens, values, alternatives, strict=True))
