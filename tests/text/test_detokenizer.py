"""Tokens have neighbours: whatever the ids, what tokens add is the text, as text and as bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from pacellm.demo import MODEL_PATH
from pacellm.errors import ModelError
from pacellm.server.writing.logprobs import TokenTexts
from pacellm.text.detokenizer import Detokenizer, Vocabulary
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import TokenLogprob
from tests.chat_families import FAMILIES, build

NAMES = [*FAMILIES, "llama2", "bundled"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    made = {name: build(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}
    llama2 = build("mistral", tmp_path_factory.mktemp("llama2"))
    llama2.backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama2.vocabulary = Vocabulary(llama2.backend)
    return made | {"llama2": llama2, "bundled": ChatTokenizer(MODEL_PATH)}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_ids_add_up(name, chats, data):
    chat = chats[name]
    size = chat.backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=24))
    skip, is_start = data.draw(st.booleans()), data.draw(st.booleans())
    texts = TokenTexts(chat.vocabulary, skip_special=skip, is_start=is_start)
    whole = Detokenizer(chat.vocabulary, skip_special=skip, is_start=is_start)
    found = [
        texts.push(TokenLogprob(token, -1.0, ((token, -1.0),)), is_last=place == len(ids))
        for place, token in enumerate(ids, 1)
    ]
    content = "".join(whole.push(token).text for token in ids) + whole.finish()
    assert "".join(one.text for one in found) == content
    assert b"".join(bytes(one.bytes) for one in found).decode(errors="replace") == content


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_texts_come_back(name, chats, text):
    """As the tokenizer itself decodes them."""
    chat = chats[name]
    ids = chat.encode(text)
    assert chat.decode(ids) == "".join(chat.texts(ids)) == chat.backend.decode(ids, skip_special_tokens=False)
    for token, added in zip(ids, chat.texts(ids), strict=True):
        assert isinstance(added, str), token


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_bytes_that_are_no_text_are_marked(name, chats):
    """A normal token behind a part of a character."""
    chat = chats[name]
    part, word = chat.backend.token_to_id("<0xF0>"), chat.encode("fox")[-1]
    text = Detokenizer(chat.vocabulary)
    found = [text.push(token) for token in (word, part, word)]
    assert [one.bytes for one in found][1] == b"\xf0"
    assert "".join(one.text for one in found).count("\ufffd") == 1
    assert found[1].text == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_character_in_parts(name, chats):
    chat = chats[name]
    ids = chat.encode("a🦜b")
    texts = TokenTexts(chat.vocabulary, skip_special=True, is_start=True)
    found = [texts.push(TokenLogprob(token, -1.0), is_last=False) for token in ids]
    assert "".join(one.text for one in found).strip() == "a🦜b"
    parts = [one for one in found if one.bytes and not one.text]
    assert parts
    assert all(one.own.text.startswith("bytes:\\x") for one in parts)
    assert list(parts[0].own.bytes) == parts[0].bytes


def test_a_space_at_the_start_belongs_to_a_text_that_goes_on(chats):
    chat = chats["llama2"]
    token = chat.encode("The")[0]
    assert chat.backend.id_to_token(token).startswith("▁")
    fresh, going = (Detokenizer(chat.vocabulary, is_start=is_start).push(token).text for is_start in (True, False))
    assert fresh == chat.backend.decode([token])
    assert going == " " + fresh


def test_special_tokens_are_written_or_left_out(chats):
    chat = chats["llama3"]
    token = chat.backend.token_to_id("<|eot_id|>")
    shown = TokenTexts(chat.vocabulary, skip_special=True, is_start=True).push(TokenLogprob(token, -1.0))
    assert (shown.text, shown.bytes) == ("", [])
    assert (shown.own.text, shown.own.bytes) == ("<|eot_id|>", None)
    assert Detokenizer(chat.vocabulary, skip_special=False).push(token).text == "<|eot_id|>"


def test_a_decoder_that_looks_ahead_is_refused():
    words = {"a</w>": 0, "b</w>": 1, "c": 2, "d": 3, "e</w>": 4, "a": 5}
    tokenizer = Tokenizer(models.BPE(words, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    with pytest.raises(ModelError, match="cannot be streamed"):
        Vocabulary(tokenizer)
