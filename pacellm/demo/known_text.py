"""What the bundled model knows, for its calibration: other prose means nothing to its 2,048 words."""

from __future__ import annotations

import itertools
import random

from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import ATTRIBUTES, draw_keys, make_document
from pacellm.text.tokenizer import ChatTokenizer

_DOCUMENT, _FACTS, _SEED = 2600, 60, 7_000_000  # not a seed of training, tests or evaluation
_PLANTED = 48


def known_text() -> str:
    """A document with its facts asked for one after another, as the chat template writes it; about 3,900 tokens, the
    last third of them questions and answers."""
    tokenizer = ChatTokenizer(MODEL_PATH)
    document = make_document(_DOCUMENT, _FACTS, _SEED, tokenizer)
    pairs = [
        [{"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.answer}]
        for fact in document.facts
    ]
    messages = list(itertools.chain.from_iterable(pairs))
    messages[0]["content"] = f"{document.text}\n\n{messages[0]['content']}"
    return tokenizer.render(messages, add_generation_prompt=False)


def known_facts() -> str:
    """Facts as such documents state them, a line each: statement | question | the same asked in another way."""
    rng = random.Random(_SEED + 1)
    stated = [(f"{one.attribute} of the {one.adjective} {one.noun}", one) for one in draw_keys(_PLANTED, rng)]
    return "\n".join(
        f"The {key} is {ATTRIBUTES[one.attribute](rng)}.|What is the {key}?|And the {key}?" for key, one in stated
    )
