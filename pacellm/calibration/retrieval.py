"""Which layers' attention finds what a question is about, and whose activity does: found out with planted facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pacellm.calibration.asking import Asking, OnWork, Voted, Votes, lexical, questions_of
from pacellm.calibration.file import (
    RETRIEVES,
    ActivitySection,
    AttentionSection,
    RetrievalSection,
    Shares,
    pack,
    pack_bytes,
    pack_halves,
    unpack,
    unpack_bytes,
    unpack_halves,
)
from pacellm.calibration.planted import PART, SINKS, Planted
from pacellm.errors import ConfigError
from pacellm.model.load import LoadedModel
from pacellm.model.neurons import ffns
from pacellm.model.retrieval import CodeBook, Nulls, Retrieval

_MOST_LAYERS = 3
_GAIN = 0.02  # of merit, for which a layer more votes
_HELPS = 0.05  # of merit, for which votes are compared with those for null questions; less is noise of 24 facts
Found = TypeVar("Found", AttentionSection, ActivitySection)

# -- what they find ----------------------------------------------------------------------------------------


def ranks(votes: np.ndarray) -> np.ndarray:
    """[kinds, facts] of each fact's block its place among all but the first, from 1. Ties: the lower index."""
    votes = votes[:, :, SINKS // PART :]
    places = np.arange(votes.shape[2])
    own = np.take_along_axis(votes, places[None, : votes.shape[1], None], 2)
    before = places[None, None] < places[None, : votes.shape[1], None]
    return 1 + ((votes > own) | ((votes == own) & before)).sum(2)


def shares(votes: np.ndarray) -> Shares:
    """Of questions whose fact's block has most votes."""
    own, other = (ranks(votes) == 1).mean(1)
    return Shares(own=round(float(own), 4), other=round(float(other), 4))


def merit(votes: np.ndarray) -> float:
    """What is chosen by: the mean reciprocal rank, which is less noise than a share."""
    return float((1 / ranks(votes)).mean())


def best_layers(votes: Votes) -> list[int]:
    """The layer that finds most, and others as long as they find more with it, each question by the largest vote."""
    chosen: list[int] = []
    best = -_GAIN
    while len(chosen) < min(_MOST_LAYERS, len(votes)):
        found = {layer: merit(together(votes, [*chosen, layer])) for layer in votes if layer not in chosen}
        layer = max(found, key=lambda one: (found[one], -one))
        if found[layer] < best + _GAIN:
            break
        chosen.append(layer)
        best = found[layer]
    return sorted(chosen)


def together(votes: Votes, layers: Sequence[int]) -> np.ndarray:
    """[kinds, facts, blocks]: the largest vote of layers, compared."""
    chosen = [votes[layer] for layer in layers]
    return Voted(
        np.maximum.reduce([one.asked for one in chosen]), np.maximum.reduce([one.nulls for one in chosen])
    ).compared()


def best_codes(votes: Votes) -> int:
    """The layer whose codes find most."""
    return max(votes, key=lambda layer: (merit(votes[layer].compared()), -layer))


def cost(model: LoadedModel, prompts: Sequence[Planted], nulls: Sequence[Sequence[int]] = ()) -> float:
    """Work of :func:`measure`, one token in one layer being 1."""
    tokens = sum(len(one.ids) + questions_of(one)[-1].rows.stop for one in prompts)
    return model.num_layers * (tokens + sum(map(len, nulls)))


def measure(
    model: LoadedModel,
    books: Mapping[int, CodeBook],
    prompts: tuple[Planted, Planted],
    nulls: Sequence[Sequence[int]] = (),
    on_work: OnWork = lambda work: None,
) -> RetrievalSection:
    """What finds the facts of the second prompt, chosen by those of the first.

    Args:
        nulls: ids of null questions, asked behind the first.

    Raises:
        ConfigError: as of :class:`Asking`.
    """
    asking = Asking(model, books, nulls, on_work)
    (attention, activity), (attention_after, activity_after) = (asking.votes(one) for one in prompts)
    return RetrievalSection(
        facts=len(prompts[1].facts),
        lexical=shares(lexical(prompts[1])),
        attention=_attention_section(attention, attention_after, asking) if attention else None,
        activity=_activity_section(activity, activity_after, books, asking) if activity else None,
        nulls=[len(one) for one in nulls],
    )


def _attention_section(votes: Votes, after: Votes, asking: Asking) -> AttentionSection:
    votes, after, compares = compared_where_it_helps(votes, after, best_layers)
    layers = best_layers(votes)
    queries = {
        str(layer): pack_halves(asking.null_queries[layer].cpu().float().numpy()) for layer in layers if compares
    }
    return AttentionSection(layers=layers, found=shares(together(after, layers)), alone=_alone(votes), nulls=queries)


def _activity_section(votes: Votes, after: Votes, books: Mapping[int, CodeBook], asking: Asking) -> ActivitySection:
    votes, after, compares = compared_where_it_helps(votes, after, lambda one: [best_codes(one)])
    book = books[best_codes(votes)]
    return ActivitySection(
        layer=book.layer, bits=book.bits, seed=book.seed,
        mean=pack(book.mean.numpy()), deviation=pack(book.deviation.numpy()),
        found=shares(after[book.layer].compared()), alone=_alone(votes),
        nulls=pack_bytes(asking.null_codes[book.layer]) if compares else "",
    )  # fmt: skip


def compared_where_it_helps(
    votes: Votes, after: Votes, best: Callable[[Votes], Sequence[int]]
) -> tuple[Votes, Votes, bool]:
    """Votes for both prompts, without those of null questions where the first one's facts are found as well by votes
    as they are; and whether they are left in."""
    bare = _bare(votes)
    helps = merit(together(votes, best(votes))) >= merit(together(bare, best(bare))) + _HELPS
    return (votes, after, True) if helps else (bare, _bare(after), False)


def _bare(votes: Votes) -> Votes:
    return {layer: one._replace(nulls=one.nulls[:0]) for layer, one in votes.items()}


def _alone(votes: Votes) -> dict[str, Shares]:
    return {str(layer): shares(one.compared()) for layer, one in votes.items()}


# -- what a server takes of it -----------------------------------------------------------------------------


def known(section: RetrievalSection | None, model: LoadedModel) -> Retrieval | None:
    """What a model's indexes need; an index that finds next to nothing is not there. None where nobody has looked.

    Raises:
        ConfigError: the section is not of such a model.
    """
    if section is None:
        return None
    attention, activity = _working(section.attention), _working(section.activity)
    for layer in attention.layers if attention is not None else ():
        if layer >= model.num_layers or model.windows[layer] is not None:
            raise _unfit(f"attention.layers names layer {layer}, which this model has not, or only with a window")
    layers = () if attention is None else tuple(attention.layers)
    book = None if activity is None else _book(activity, model)
    nulls = _nulls(section.nulls, attention, activity, model)
    if attention is None or activity is None:
        return Retrieval(layers, book, nulls=nulls)
    finds_more = activity.found.other > attention.found.other
    return Retrieval(layers, book, "activity" if finds_more else "attention", nulls)


def _nulls(
    lengths: Sequence[int], attention: AttentionSection | None, activity: ActivitySection | None, model: LoadedModel
) -> Nulls:
    """Null questions of the indexes that work.

    Raises:
        ConfigError: they are not of such a model.
    """
    tokens, queries, codes = sum(lengths), dict[int, Tensor](), None
    if not tokens:
        return Nulls()
    for name, packed in attention.nulls.items() if attention is not None else ():
        shape = model.query_heads[int(name)], tokens, model.kv_shapes[int(name)][0][1]
        numbers = torch.from_numpy(unpack_halves(packed))
        if numbers.numel() != math.prod(shape):
            raise _unfit(f"attention.nulls are not queries of layer {name} of this model")
        queries[int(name)] = numbers.view(shape)
    if activity is not None and activity.nulls:
        codes = unpack_bytes(activity.nulls).reshape(tokens, -1)
        if codes.shape[1] != activity.bits // 8:
            raise _unfit("activity.nulls are not codes of so many bits")
    return Nulls(tuple(lengths), queries, codes)


def _working(section: Found | None) -> Found | None:
    """A section of an index that finds more than next to nothing."""
    return section if section is not None and section.found.both >= RETRIEVES else None


def _book(section: ActivitySection, model: LoadedModel) -> CodeBook:
    mean, deviation = (torch.from_numpy(unpack(one)) for one in (section.mean, section.deviation))
    found = dict(enumerate(ffns(model.module))).get(section.layer)
    if found is None or found.inner != len(mean):
        raise _unfit(f"activity is of {len(mean):,} neurons in layer {section.layer}, which this model has not there")
    return CodeBook(section.layer, mean, deviation, section.bits, section.seed)


def _unfit(problem: str) -> ConfigError:
    return ConfigError(
        f"calibration: retrieval.{problem}; make it again with `pacellm calibrate MODEL --again`", param="calibration"
    )
