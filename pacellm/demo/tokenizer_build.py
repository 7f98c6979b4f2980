"""Build the bundled tokenizer: byte-level BPE of 2,048 tokens trained on the generator's own text.

Digits are always single tokens. A space is put before every text segment and taken off when decoding (as Llama's
tokenizers do), so that a value has the same tokens in the document and at the start of an answer.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from pacellm.demo import words
from pacellm.demo.generator import (
    ATTRIBUTES,
    FILLERS,
    NOT_STATED,
    QUESTIONS,
    STATEMENTS,
    draw_keys,
    filler_sentence,
)

VOCAB_SIZE = 2048
MAX_LENGTH = 262_144
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] in ('system', 'developer') -%}
        {{- '<|system|>' + message['content'] + '<|end|>' -}}
    {%- elif message['role'] in ('user', 'assistant') -%}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
    {%- else -%}
        {{- raise_exception('unknown role: ' + message['role'] + ' (system, developer, user and assistant exist)') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

ENGLISH = (
    "You answer questions about the document with a short answer.",
    "You are a helpful assistant. Answer from the document only.",
    "Hello, how are you today? I am fine, thank you very much.",
    "Document: Question: Answer:",
    "Which of these would you like to see first, and why?",
    "This is a test of the server. Please write a short summary of the text above.",
)


def corpus(num_sentences: int = 40_000, seed: int = 0) -> Iterator[str]:
    """Sentences in which every listed word is frequent enough to become one token."""
    rng = random.Random(seed)
    lists = [value for name, value in vars(words).items() if name.isupper()]
    for index in range(num_sentences):
        key = draw_keys(1, rng)[0]
        value = ATTRIBUTES[key.attribute](rng)
        yield rng.choice(STATEMENTS).format(key=key, value=value)
        yield rng.choice(QUESTIONS).format(key=key)
        yield filler_sentence(rng)
        yield " ".join(rng.choice(entries) for entries in lists)
        if index % 50 == 0:
            yield NOT_STATED
            yield from ENGLISH
            yield "\n".join(template.split(" ", 1)[0] for template in FILLERS + STATEMENTS + QUESTIONS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the result does not depend on anything but this package's text."""
    raw = RawTokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Split(Regex("[0-9]"), "isolated")]
    )
    raw.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    """Command line: write the tokenizer into a directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    build_tokenizer().save_pretrained(parser.parse_args().out)


if __name__ == "__main__":
    main()
