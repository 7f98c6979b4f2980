"""Decoded tokens, each a segment of its own, of many sequences and layers at once: what ``segment.py`` does for one, to
the bit.

A decode step reads one token against each bank. That is little arithmetic, on memory and with code that the model's
weights have driven out of the caches, so what counts is how few different operations there are: torch makes the
products, lengths and choices, NumPy what is done to a row of them, and a verdict is a few numbers. On a CPU only,
because it asks for the outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pacellm.config import PAConfig
from pacellm.memory.rule import merge, replace, replacement_key
from pacellm.memory.similarity import TOGETHER, Total, cosines
from pacellm.memory.state import EMPTY, FUSES, HITS, MERGES, MISSES, REPLACEMENTS, BankState, compute_dtype


class DecodedToken(NamedTuple):
    """A decoded token of one sequence in one layer.

    Attributes:
        bank: its sequence's, not in the middle of a segment.
        writes: whether it changes the bank.
        inner: [T, F] inner activations of it and of others.
        row: its own.
        y: [H], its bias-free FFN output.
        mask: [F] bool, the neurons that its similarities are about, outside of which its inner activations are 0; None
            is all.
    """

    bank: BankState
    writes: bool
    inner: Tensor
    row: int
    y: Tensor
    mask: Tensor | None = None


@np.errstate(all="ignore")  # as torch
def feed(tokens: Sequence[DecodedToken], config: PAConfig, total: Total | None = None) -> list[Tensor]:
    """Read each token against its bank and, where asked, write it.

    Args:
        tokens: of no bank two.
        config: that of all banks.
        total: sums over the ranks that F is split over, where it is.

    Returns:
        For each [H], its output before the bias; under ``observe`` that is y.
    """
    banks, _, inner, rows, _, masks = zip(*tokens, strict=True)
    similarity = cosines([bank.keys for bank in banks], list(zip(inner, rows, strict=True)), masks, total)
    outputs = []
    for row, (token, found) in enumerate(zip(tokens, _judge(similarity, banks, config), strict=True)):
        output = token.y
        token.bank.counters.numpy()[found.outcome] += 1
        if found.recalls and (config.acts or (token.writes and not found.high)):
            output = _recalled(token, similarity[row], found, config)
        if token.writes:
            _write(token, found, output, config)
        outputs.append(output if config.acts else token.y)
    return outputs


class _Found(NamedTuple):
    """A :class:`pacellm.memory.rule.Verdict` of one token: which counter it is, what becomes of it, and [k] the most
    similar slots of those that exist, best first."""

    outcome: int
    high: bool | np.bool
    low: bool | np.bool
    slots: np.ndarray

    @property
    def recalls(self) -> bool:
        """Its output is not the plain one."""
        return self.outcome in (HITS, FUSES)


def _judge(similarity: Tensor, banks: Sequence[BankState], config: PAConfig) -> list[_Found]:
    """What :func:`pacellm.memory.rule.judge` does. Slots that do not exist become similar to nothing."""
    filled, slots = [int(bank.filled) for bank in banks], similarity.shape[1]
    for row, count in enumerate(filled):
        if count < slots:
            similarity[row, count:] = -torch.inf
    best, places = (part.numpy() for part in similarity.topk(min(config.top_k, slots), dim=1))
    number, found = best.dtype.type, []
    high, low = number(config.high), number(config.low)
    for sigmas, chosen, count in zip(best, places, filled, strict=True):
        if not count:
            found.append(_Found(EMPTY, False, True, chosen[:0]))
            continue
        sigmas = sigmas[:count]
        mean = sum(sigmas[1:], start=sigmas[0]) / number(len(sigmas))  # added left to right
        outcome = HITS if sigmas[0] > high else FUSES if sigmas[0] > low else MISSES
        found.append(_Found(outcome, mean > high, mean <= low, chosen[:count]))
    return found


def _recalled(token: DecodedToken, similarity: Tensor, found: _Found, config: PAConfig) -> Tensor:
    """[H] output of a token that recalls: what :func:`pacellm.memory.rule.weigh` and ``mix`` do."""
    weights = torch.zeros(TOGETHER, len(similarity), dtype=similarity.dtype)
    _weigh(weights.numpy()[0], similarity, int(token.bank.filled), found, config)
    recalled = torch.mm(weights, token.bank.values.to(weights.dtype)).numpy()[0]
    plain = token.y.to(weights.dtype).numpy()
    if config.is_paper and found.outcome == FUSES:
        recalled = recalled + (1.0 - config.fuse_weight) * plain
    if config.mix != 1.0:
        recalled = (1.0 - config.mix) * plain + config.mix * recalled
    return torch.from_numpy(recalled).to(token.y.dtype)


def _weigh(weights: np.ndarray, similarity: Tensor, filled: int, found: _Found, config: PAConfig) -> None:
    """Into [M] zeros."""
    number = weights.dtype.type
    share = np.float32(config.fuse_weight if found.outcome == FUSES else 1.0)  # torch.where's dtype for two numbers
    weights[found.slots] = number(share) / number(len(found.slots))
    count = min(config.bottom_k, len(weights))
    if count:
        if filled < len(weights):
            similarity[filled:] = torch.inf
        worst = similarity.topk(count, largest=False).indices.numpy()[:filled]
        weights[worst] += number(config.negative_weight) / number(len(worst))


def _write(token: DecodedToken, found: _Found, output: Tensor, config: PAConfig) -> None:
    """A segment of one token."""
    bank, x = token.bank, token.inner[token.row]
    bank.clock.add_(1)
    if found.low:
        key = replacement_key(bank.usage, bank.stamp, bank.clock, config)
        replace(bank.slots, key.argmin(-1, keepdim=True), x[None], output[None], bank.clock)
        bank.filled.clamp_(max=len(bank.usage) - 1).add_(1)
        bank.counters.numpy()[REPLACEMENTS] += 1
    elif not found.high:
        wide, places = compute_dtype(x.dtype), torch.from_numpy(found.slots)
        keys, values = (part[None].to(wide) + 0.0 for part in (x, output))  # as sums that begin with 0
        merge(bank.slots, places, keys, values, bank.clock, config.momentum)
        bank.counters.numpy()[MERGES] += len(places)
    elif config.is_paper:
        bank.usage.numpy()[found.slots] += 1
