"""Special tokens in texts are text for the tokenizers of real models."""

import random

import pytest

from pacellm.text.tokenizer import ChatTokenizer
from tests.chat_families import GEMMA
from tests.text.test_literals import ids_of, said, shielded, talk


@pytest.fixture(scope="module")
def chats(smollm2, gemma3, tmp_path_factory):
    template = tmp_path_factory.mktemp("gemma") / "template.jinja"
    template.write_text(GEMMA)
    return ChatTokenizer(smollm2), ChatTokenizer(gemma3, template)


def test_other_texts_are_encoded_as_ever(chats):
    rng = random.Random(0)
    for chat in chats:
        for _ in range(100):
            messages = talk(*(said(rng, 30) for _ in range(rng.choice((1, 3, 5)))))
            expected = chat._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            rendered = chat.render(shielded(chat, messages))
            assert chat.encode_chat(rendered) == expected
            assert chat.literals._apart(rendered, None) == expected


def test_special_tokens_are_text(chats):
    for chat, marks in zip(chats, (("<|im_start|>", "<|im_end|>"), ("<start_of_turn>", "<end_of_turn>")), strict=True):
        numbers = [chat.backend.token_to_id(mark) for mark in (*marks, "<|endoftext|>", "<eos>", "<unused7>", "<bos>")]
        plain = [number for number in ids_of(chat, "hello") if number in numbers]
        for mark in (*marks, "<|endoftext|>", "<eos>", "<unused7>", "<bos>"):
            ids = ids_of(chat, f"x{mark}{mark} y\n\n\n{mark}")
            assert [number for number in ids if number in numbers] == plain
            assert f"x{mark}{mark} y\n\n\n{mark}" in chat.decode(ids)


def test_text_that_a_tokenizer_has_tokens_for_stays_one_token(chats):
    _, gemma = chats
    for text in ("<table>", "\n\n\n", "<b>", "▁▁▁"):
        number = gemma.backend.token_to_id(text)
        assert number in ids_of(gemma, f"a{text}b <eos> ")
