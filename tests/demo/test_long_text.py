"""The long document of the demo on a real model."""

import pytest

from pacellm.demo import MODEL_PATH
from pacellm.demo.library_text import library_text
from pacellm.demo.real import long_document, real_document
from pacellm.errors import ConfigError
from pacellm.text.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(MODEL_PATH)


def test_it_has_the_asked_size_and_the_short_one_s_facts(tokenizer):
    document = long_document(20_000, tokenizer)
    assert len(tokenizer.encode(document.text)) == pytest.approx(20_000, rel=0.05)
    assert [fact.question for fact in document.facts] == [fact.question for fact in real_document().facts]
    places = [document.text.index(fact.answer) for fact in document.facts]
    assert places == sorted(places)
    assert document == long_document(20_000, tokenizer)


def test_there_is_no_more_than_the_library_says(tokenizer):
    assert sum(map(len, library_text())) > 10**6
    with pytest.raises(ConfigError, match="tokens of prose for this model; give at most that"):
        long_document(10**8, tokenizer)
