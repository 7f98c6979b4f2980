"""Training batches: conversations about synthetic documents, and n-gram dictionaries.

A dictionary is a sequence of random n-grams in random order with random gaps. Only matching what came before the
current token against earlier text predicts a repeated n-gram, so dictionaries teach the matching and copying that
answers need long before language would (see MODEL_CARD.md).
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pacellm.demo.generator import NOT_STATED, Fact, make_document, question_text, unknown_keys

SYSTEM_PROMPTS = (
    "You answer questions about the document with a short answer.",
    "You are a helpful assistant. Answer from the document only.",
    "You are a helpful assistant.",
)
GENERAL_QUESTIONS = ("Hello, how are you today?", "Please write a short summary.", "What is this?", "Tell me more.")


class Batch(NamedTuple):
    """Token ids [B, T], and for each the weight [B, T] of predicting it (0 for the first token and padding)."""

    tokens: Tensor
    weights: Tensor


def conversation(
    length: int, max_questions: int, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[dict[str, str]]:
    """A document of nearly ``length`` tokens with questions, some of them without an answer in the document."""
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.1 else []
    num_questions = rng.randint(1, min(max_questions, 2 + length // 64))
    size = length - 25 * num_questions - 20 * len(messages) - 12
    if size < 24 or rng.random() < 0.02:
        asked = [Fact(question, NOT_STATED, 0.0) for question in _baseless(num_questions, rng)]
        return messages + _turns("", asked)
    most = max(1, size // 22)
    num_facts = 0 if rng.random() < 0.02 else min(most, int(2 ** rng.uniform(0, np.log2(most) + 0.5)))
    document = make_document(size, num_facts, rng.getrandbits(40), tokenizer, num_unknown=num_questions)
    unknown = [Fact(question, NOT_STATED, 0.0) for question in document.unknown_questions]
    asked = []
    for _ in range(num_questions):
        pool = document.facts if document.facts and rng.random() < 0.72 else unknown
        asked.append(rng.choice(pool))
    layout = "Document: {}\n\nQuestion: " if rng.random() < 0.15 else rng.choice(("{}\n\n", "{}\n\n", "{}\n", "{} "))
    return messages + _turns(layout.format(document.text), asked)


def _baseless(count: int, rng: random.Random) -> list[str]:
    """Questions without any document."""
    general = [rng.choice(GENERAL_QUESTIONS) for _ in range(count)]
    keyed = [question_text(key, rng) for key in unknown_keys(count, [], rng)]
    return [rng.choice(pair) if rng.random() < 0.3 else pair[1] for pair in zip(general, keyed, strict=True)]


def _turns(preface: str, asked: list[Fact]) -> list[dict[str, str]]:
    messages = []
    for index, fact in enumerate(asked):
        messages.append({"role": "user", "content": (preface if index == 0 else "") + fact.question})
        messages.append({"role": "assistant", "content": fact.answer})
    return messages


def conversation_row(
    length: int, max_questions: int, tokenizer: PreTrainedTokenizerBase, rng: random.Random, lm_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """One conversation as tokens [T] and weights [T]: 1 for answers and their end, ``lm_weight`` for the rest."""
    text = tokenizer.apply_chat_template(conversation(length, max_questions, tokenizer, rng), tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    assistant, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    weights, answering = [], False
    for token in ids:
        weights.append(1.0 if answering else lm_weight)
        answering = token == assistant or (answering and token != end)
    weights[0] = 0.0
    padding = length - len(ids)
    return np.pad(ids, (0, padding), constant_values=tokenizer.pad_token_id), np.pad(weights, (0, padding))


def dictionary_row(length: int, vocab_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One n-gram dictionary as tokens [T] and weights [T]: 1 from the third token of every repeated n-gram."""
    alphabet = rng.permutation(np.arange(6, vocab_size))[: int(np.exp(rng.uniform(np.log(16), np.log(vocab_size - 6))))]
    entries = [rng.choice(alphabet, rng.integers(4, 15)) for _ in range(rng.integers(2, max(3, length // 40 + 1)))]
    tokens: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    seen: set[int] = set()
    total = 0
    while total < length:
        index = int(rng.integers(len(entries)))
        gap = rng.choice(alphabet, rng.integers(0, 6))
        weight = np.zeros(len(gap) + len(entries[index]))
        weight[len(gap) + 2 :] = float(index in seen)
        seen.add(index)
        tokens.append(np.concatenate([gap, entries[index]]))
        weights.append(weight)
        total += len(weight)
    return np.concatenate(tokens)[:length], np.concatenate(weights)[:length]


def make_batch(
    number: int,
    length: int,
    num_tokens: int,
    dictionary_share: float,
    max_questions: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Batch:
    """The batch of one training step; it depends on the arguments only, so that a resumed run sees the same data."""
    rng = random.Random(f"batch {number}")
    generator = np.random.default_rng(number)
    rows = [
        dictionary_row(length, len(tokenizer), generator)
        if rng.random() < dictionary_share
        else conversation_row(length, max_questions, tokenizer, rng, lm_weight=0.1)
        for _ in range(max(1, num_tokens // length))
    ]
    tokens, weights = (np.stack(part) for part in zip(*rows, strict=True))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(weights).float())
