"""What finds planted facts is found, written, and used as it was measured."""

import dataclasses
from random import Random

import numpy as np
import pytest
import torch

from pacellm.calibration.asking import Moments, Voted, lexical, watching
from pacellm.calibration.file import ActivitySection, AttentionSection, RetrievalSection, Shares
from pacellm.calibration.perplexity import Meter
from pacellm.calibration.planted import LEAST, MOST, PART, SINKS, WINDOW, Fact, facts_of, text_of_facts, two_prompts
from pacellm.calibration.retrieval import (
    best_codes,
    best_layers,
    compared_where_it_helps,
    known,
    measure,
    ranks,
    shares,
    together,
)
from pacellm.engine.device import coder_of
from pacellm.errors import ConfigError
from pacellm.experts.apply import apply_layout
from pacellm.model.load import prepare
from pacellm.model.retrieval import Retrieval
from tests.engine.helpers import prompt
from tests.experts.test_layout import random_layout
from tests.models import FAMILIES, tiny

IDS = prompt(300)


NULLS = [prompt(4, 7), prompt(6, 8)]


def some_facts(count=16):
    random = Random(3)
    stated = [tuple(random.randrange(3, 97) for _ in range(8)) for _ in range(count)]
    return [Fact(one, (one[:5], one[4::-1])) for one in stated]


def learned(model):
    moments = Moments(model)
    meter = Meter(model, IDS, 64)
    with moments.watching():
        meter.read_plain()
    return moments.books()


def test_prompts_hold_different_facts_in_their_blocks():
    facts = some_facts(20)
    prompts = two_prompts(IDS, facts, 4096)
    assert not set(prompts[0].facts) & set(prompts[1].facts)
    for one in prompts:
        assert len(one.ids) == SINKS + 10 * PART + WINDOW
        for number, fact in enumerate(one.facts):
            block = one.ids[SINKS + number * PART : SINKS + (number + 1) * PART]
            assert fact.stated in [block[start : start + 8] for start in range(PART - 7)]
    assert two_prompts(IDS, facts, SINKS + WINDOW + LEAST * PART - 1) is None
    assert two_prompts(IDS, some_facts(2 * LEAST - 1), 4096) is None


def test_the_facts_are_enough():
    found = facts_of(text_of_facts(), lambda text: list(text.encode()))
    assert len(found) >= 2 * MOST - 8  # by bytes, a few do not fit
    assert len(text_of_facts().splitlines()) == 2 * MOST


def made_votes(right, hub=None):
    """[2, 6, blocks] in which so many of each kind's questions are answered rightly, and a block attracts all."""
    votes = np.full((2, 6, 8 + 6), 1.0)
    for kind, count in enumerate(right):
        for fact in range(count):
            votes[kind, fact, 8 + fact] = 2.0
    if hub is not None:
        votes[:, :, hub] = 3.0
    votes[:, :, 0] = 9.0  # always shown, so not in the running
    nulls = np.full((2, 8 + 6), 1.0)
    if hub is not None:
        nulls[:, hub] = 3.0
    return Voted(votes, nulls)


def test_shares_and_ranks():
    assert shares(made_votes((6, 3)).asked) == Shares(own=1.0, other=0.5)
    assert shares(made_votes((0, 0)).asked) == Shares(own=0.1667, other=0.1667)  # of equals the first is taken
    assert ranks(made_votes((6, 0)).asked)[1].tolist() == [1, 2, 3, 4, 5, 6]


def test_what_finds_most_is_chosen_whatever_a_block_attracts():
    votes = {0: made_votes((2, 2)), 1: made_votes((6, 6), hub=10), 2: made_votes((3, 1))}
    assert shares(votes[1].asked).both < shares(votes[2].asked).both
    assert shares(votes[1].compared()).both > 0.8  # all but that of the hub's own fact
    assert best_codes(votes) == 1
    assert best_layers(votes) == [1]
    first, second = made_votes((6, 0)), made_votes((0, 6))
    assert best_layers({3: first, 5: second, 7: made_votes((0, 0))}) == [3, 5]
    assert shares(together({3: first, 5: second}, [3, 5])) == Shares(own=1.0, other=1.0)


def test_null_questions_are_left_out_where_they_do_not_help():
    drawn, even = {0: made_votes((6, 6), hub=10)}, {0: made_votes((6, 3))}
    for votes, helps in ((drawn, True), (even, False)):
        first, second, compares = compared_where_it_helps(votes, votes, best_layers)
        assert (compares, len(first[0].nulls), len(second[0].nulls)) == (helps, 2 * helps, 2 * helps)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_measured_and_left_as_it_was(family):
    model = prepare(tiny(family))
    hooks = [len(module._forward_pre_hooks) for module in model.module.modules()]
    books = learned(model)
    assert sorted(books) == [0, 1]
    prompts = two_prompts(IDS, some_facts(), 4096)
    work = []
    section = measure(model, books, prompts, NULLS, work.append)
    assert sum(work) == 3 * (sum(len(one.ids) + 8 * 10 for one in prompts) + 10)
    full = [str(layer) for layer, window in enumerate(model.windows) if window is None]
    assert (list(section.attention.alone) if section.attention else []) == full
    assert section.activity.alone["0"].own > 1 / 8  # the first layer's activity is the token's
    assert section.lexical == shares(lexical(prompts[1]))
    assert [len(module._forward_pre_hooks) for module in model.module.modules()] == hooks
    again = RetrievalSection.model_validate_json(section.model_dump_json())
    found = Shares(own=0.5, other=0.5)
    again = again.model_copy(update={"activity": again.activity.model_copy(update={"found": found})})
    book, nulls = known(again, model).book, known(again, model).nulls
    assert nulls.lengths == (4, 6)
    assert (nulls.codes is not None) == bool(again.activity.nulls)
    if nulls.codes is not None:
        assert nulls.codes.shape == (10, 32)
    assert [one.stop for one in nulls.rows] == [4, 10]
    for layer, queries in nulls.queries.items():
        assert queries.shape == (model.query_heads[layer], 10, model.kv_shapes[layer][0][1])
    assert torch.equal(book.mean, books[book.layer].mean)
    assert torch.equal(book.deviation, books[book.layer].deviation)
    assert (book.bits, book.seed) == (256, 0)


def section(attention=0.5, activity=0.5, layers=(0,), layer=1):
    books = learned(prepare(tiny("llama")))
    codes = measure(prepare(tiny("llama")), books, two_prompts(IDS, some_facts(), 4096)).activity
    share = {"found": Shares(own=attention, other=attention), "alone": {}}
    own = {"found": Shares(own=activity, other=activity), "layer": layer}
    return RetrievalSection(
        facts=8,
        lexical=Shares(own=1, other=0),
        attention=AttentionSection(layers=list(layers), **share),
        activity=ActivitySection(**{**codes.model_dump(), **own}),
    )


def test_what_does_not_retrieve_is_left_out():
    model = prepare(tiny("llama"))
    assert known(None, model) is None
    found = known(section(0.5, 0.6), model)
    assert (found.layers, found.book.layer, found.best) == ((0,), 1, "activity")
    assert known(section(0.6, 0.5), model).best == "attention"
    assert known(section(0.1, 0.1), model) == Retrieval()
    assert known(section(0.1, 0.5), model).layers == ()
    assert known(section(0.5, 0.1), model).book is None


def test_another_models_section_is_refused():
    with pytest.raises(ConfigError, match=r"attention.layers names layer 3.* --again"):
        known(section(layers=(0, 3)), prepare(tiny("llama")))
    with pytest.raises(ConfigError, match="names layer 0, which this model has not, or only with a window"):
        known(section(), prepare(tiny("smollm3")))
    with pytest.raises(ConfigError, match="activity is of 48 neurons in layer 3"):
        known(section(layer=3), prepare(tiny("llama")))


def codes_of(model):
    coder, found = coder_of(model), []
    meter = Meter(model, IDS, 64)
    with watching(model, lambda layer, inner: found.append(coder(inner)), [coder.layer]):
        meter.read_plain()
    return torch.cat(found)


def test_codes_are_the_same_with_a_layout():
    model = prepare(tiny("llama"))
    model = dataclasses.replace(model, retrieval=Retrieval(book=learned(model)[1]))
    plain = codes_of(model)
    moved = apply_layout(model, random_layout(model.module))
    assert moved.layout.layers[1].permutation.tolist() != list(range(48))
    differing = np.bitwise_count((plain ^ codes_of(moved)).numpy()).sum() / (8 * plain.numel())
    assert differing < 1e-3  # rounding
    unordered = codes_of(dataclasses.replace(moved, layout=None))
    assert np.bitwise_count((plain ^ unordered).numpy()).sum() / (8 * plain.numel()) > 0.2
