"""Log-probabilities as clients read them: each token by what it adds to the text."""

from __future__ import annotations

from typing import NamedTuple

from pacellm.text.detokenizer import Detokenizer, Vocabulary
from pacellm.types import TokenLogprob


class Alternative(NamedTuple):
    """A token that might have come: ``bytes`` is None where it would not have been text."""

    token: int
    text: str
    bytes: list[int] | None
    logprob: float


class Scored(NamedTuple):
    """A token that came.

    Attributes:
        text, bytes: what it adds to the text, "" and none where it is no text.
        logprob: None where nothing stands before it.
        own: the token as one of the alternatives.
        top: alternatives, best first.
    """

    text: str
    bytes: list[int]
    logprob: float | None
    own: Alternative
    top: list[Alternative]


class TokenTexts:
    """Reads the tokens of one text in order: their texts, and their bytes, put together are the text.

    Args:
        vocabulary: of the tokenizer.
        skip_special: special tokens are no text.
        is_start: nothing stands before the text.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool, is_start: bool) -> None:
        self._skipped = vocabulary.special if skip_special else frozenset()
        self._text = Detokenizer(vocabulary, skip_special=skip_special, is_start=is_start)

    def push(self, item: TokenLogprob, *, is_last: bool = False) -> Scored:
        """The next token; ``is_last`` ends the text."""
        own = self._alternative(item.token_id, item.logprob)
        top = [self._alternative(token, logprob) for token, logprob in item.top]
        return self._scored(item.token_id, item.logprob, own, top, is_last)

    def first(self, token: int, *, is_last: bool = False) -> Scored:
        """A text's first token, which was not foretold."""
        return self._scored(token, None, self._alternative(token, 0.0), [], is_last)

    def _scored(
        self, token: int, logprob: float | None, own: Alternative, top: list[Alternative], is_last: bool
    ) -> Scored:
        found = self._text.push(token, is_last=is_last)
        return Scored(found.text, list(found.bytes), logprob, own, top)

    def _alternative(self, token: int, logprob: float) -> Alternative:
        found = self._text.peek(token)
        return Alternative(token, found.text, None if token in self._skipped else list(found.bytes), logprob)
