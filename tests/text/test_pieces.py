"""Encoding by pieces gives what encoding the whole gives, and remembers within one scope."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from pacellm.demo import MODEL_PATH
from pacellm.text.pieces import PieceMemo
from pacellm.text.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def backend():
    return ChatTokenizer(MODEL_PATH).backend


class Counting:
    """A backend that counts the characters it encodes."""

    def __init__(self, backend):
        self._backend, self.characters = backend, 0

    def get_added_tokens_decoder(self):
        return self._backend.get_added_tokens_decoder()

    def encode_batch_fast(self, texts, add_special_tokens):
        self.characters += sum(map(len, texts))
        return self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def memo_of(backend, **options):
    return PieceMemo(backend, backend.get_added_tokens_decoder().values(), **options)


def text_of(rng, pieces=6):
    parts = ["a bc ", "  ", "\n", "48213", "Ünï 漢", "word word. ", "<|"]
    specials = ["<|user|>", "<|end|>", "<|assistant|>", "<|bos|>"]
    return "".join(
        rng.choice(specials) + "".join(rng.choice(parts) for _ in range(rng.choice((3, 2000)))) for _ in range(pieces)
    )


def test_a_scope_can_be_forgotten():
    memo = memo_of(ChatTokenizer(MODEL_PATH).backend)
    text = "word " * 1000
    for scope in ("one/a", "one/b", "two/a"):
        memo.encode(text, scope)
    assert len(memo._known) == 3
    memo.forget("one/a")
    memo.forget("two/", below=True)
    assert [scope for scope, _ in memo._known] == ["one/b"]
    assert memo._num_tokens == len(memo.encode(text))


def test_pieces_give_the_whole(backend):
    memo, rng = memo_of(backend), random.Random(0)
    assert memo.is_exact
    for _ in range(20):
        text = text_of(rng)
        expected = backend.encode(text, add_special_tokens=False).ids
        assert memo.encode(text, "s") == expected
        assert memo.encode(text, "s") == expected
        assert memo.encode(text) == expected


def test_a_follow_up_encodes_what_is_new_only(backend):
    counting = Counting(backend)
    memo = memo_of(counting)
    history = "<|bos|><|user|>" + "a long document. " * 1000 + "<|end|><|assistant|>yes<|end|>"
    memo.encode(history, "s")
    before = counting.characters
    memo.encode(history + "<|user|>more?<|end|>", "s")
    assert counting.characters - before < 100
    memo.encode(history, "another")
    assert counting.characters - before > 10_000


def test_memory_is_bounded(backend):
    memo = memo_of(backend, max_tokens=5000)
    for number in range(20):
        memo.encode("<|user|>" + f"{number} words and words " * 300, "s")
    assert memo._num_tokens <= 5000
    assert memo._num_tokens == sum(map(len, memo._known.values()))


def test_a_tokenizer_whose_special_tokens_eat_spaces_is_not_trusted():
    strange = Tokenizer(models.BPE({"a": 0, " ": 1}, []))
    strange.pre_tokenizer = pre_tokenizers.Whitespace()
    strange.add_special_tokens([AddedToken("<s>", lstrip=True, rstrip=True, special=True)])
    assert not PieceMemo(strange, strange.get_added_tokens_decoder().values()).is_exact
