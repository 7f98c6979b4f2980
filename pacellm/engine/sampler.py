"""Logits to token ids. Each request's row is worked on alone, so batch mates cannot change what it gets.

Randomness is a function of the request's seed and the number of tokens it has generated: nothing else, so a
preempted request goes on with the same text.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
import torch
from torch import Tensor

from pacellm.types import SamplingParams, TokenLogprob


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
        raise ValueError("the model produced logits that are not finite")
    shaped = _bias(_penalise(logits, params, prompt, generated), params)
    if allowed is not None:
        shaped = shaped.masked_fill(~torch.from_numpy(allowed).to(shaped.device), -torch.inf)
    token = int(shaped.argmax()) if params.temperature == 0 else _draw(shaped, params, seed, len(generated))
    return token, None if params.logprobs is None else _logprob(logits, token, params.logprobs)


def _penalise(logits: Tensor, params: SamplingParams, prompt: array[int], generated: list[int]) -> Tensor:
    """OpenAI's presence and frequency penalties on what was generated; repetition (CTRL, arXiv 1909.05858) also on
    the prompt."""
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.concatenate([np.asarray(prompt), np.array(generated, dtype=np.int32)])))
        seen = seen.long().to(logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(generated), return_counts=True)
        counts_on_device = torch.from_numpy(counts).to(logits)
        penalties = params.presence_penalty + params.frequency_penalty * counts_on_device
        logits = logits.index_add(0, torch.from_numpy(ids).to(logits.device), -penalties)
    return logits


def _bias(logits: Tensor, params: SamplingParams) -> Tensor:
    if not params.logit_bias:
        return logits
    tokens = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
    if int(tokens.max()) >= logits.shape[0]:
        raise ValueError(f"logit_bias names token {int(tokens.max())}; the vocabulary has {logits.shape[0]}")
    return logits.index_add(0, tokens, torch.tensor([bias for _, bias in params.logit_bias]).to(logits))


def _draw(logits: Tensor, params: SamplingParams, seed: int, count: int) -> int:
    """One token from the distribution that temperature, top_k, top_p and min_p leave."""
    probabilities, order = (logits.double() / params.temperature).softmax(-1).sort(descending=True, stable=True)
    keep = probabilities > 0
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        keep &= probabilities.cumsum(0) - probabilities < params.top_p
    if params.min_p > 0.0:
        keep &= probabilities >= params.min_p * probabilities[0]
    kept = probabilities * keep
    cumulative = kept.cumsum(0)
    target = _uniform(seed, count) * float(cumulative[-1])
    place = int(
        torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64, device=logits.device), right=True)
    )
    return int(order[min(place, int(keep.nonzero()[-1]))])


def _uniform(seed: int, count: int) -> float:
    """A number in [0, 1) for the count-th token of a seed."""
    digest = hashlib.blake2b(f"{seed} {count}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def _logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
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
        raise ValueError("the model produced logits that are not finite")
    logprobs = logits.log_softmax(-1)
    ids = torch.tensor(list(tokens), device=logits.device)
    values = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    best = logprobs.topk(top, dim=1)
    alternatives = (
        tuple(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return tuple(TokenLogprob(*one) for one in zip(tokens, values, alternatives, strict=True))
