"""Streaming text: whatever the tokens, the pieces add up to the whole, and stop strings are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pacellm.text.detokenizer import Vocabulary
from pacellm.text.stream import TextStream


def byte_tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)


def stream(text, *stop):
    out, pieces = TextStream(VOCABULARY, stop), []
    for token in TOKENIZER.encode(text).ids:
        pieces.append(out.push(token))
        if out.stopped_by is not None:
            break
    pieces.append(out.finish())
    return pieces, out.stopped_by


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_pieces_add_up(text):
    pieces, stopped = stream(text, "\x00never\x00")
    assert "".join(pieces) == text
    assert stopped is None


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abé", max_size=20), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_at_their_first_place_and_never_show(text, stops):
    pieces, stopped = stream(text, *stops)
    shown = "".join(pieces)
    assert text.startswith(shown)
    assert all(stop not in shown for stop in stops)
    assert (stopped is not None) == any(stop in text for stop in stops)


def test_a_possible_stop_string_is_held_back():
    pieces, stopped = stream("one STOX two STOP three", "STOP")
    assert "".join(pieces) == "one STOX two "
    assert stopped == "STOP"
    assert "S" not in pieces[4]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_incomplete_character_at_the_end_is_not_swallowed(cut):
    out = TextStream(VOCABULARY, ())
    ids = TOKENIZER.encode("x😀").ids[: 1 + cut]
    text = "".join(out.push(token) for token in ids) + out.finish()
    assert text == "x" + "\ufffd" * text.count("\ufffd")
    assert "\ufffd" in text
