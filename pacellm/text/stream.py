"""Ids to text as they come: split characters and possible stop strings are held back."""

from __future__ import annotations

from pacellm.text.detokenizer import Detokenizer, Vocabulary


class TextStream:
    """The text of one answer.

    Args:
        vocabulary: of the tokenizer.
        stop: strings that end the answer and are cut from it.
        skip_special: leave special tokens out.
        is_start: the answer does not go on from a text.

    Attributes:
        stopped_by: the stop string that ended it.
    """

    def __init__(
        self, vocabulary: Vocabulary, stop: tuple[str, ...], *, skip_special: bool = True, is_start: bool = True
    ) -> None:
        self._stop = stop
        self._detokenizer = Detokenizer(vocabulary, skip_special=skip_special, is_start=is_start)
        self._held = ""
        self._texts: list[str] = []  # what each token brought; kept for stop strings only
        self._length = 0  # characters released, or held
        self.stopped_by: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the text before the stop string; one that reaches into it counts if it is more than white space."""
        count, left = 0, self._length
        for number, text in enumerate(self._texts, 1):
            if text[:left] and (len(text) <= left or text[:left].strip()):
                count = number
            left = max(0, left - len(text))
        return count

    def push(self, token: int) -> str:
        """Text that is now certain. Sets ``stopped_by`` where a stop string is complete."""
        text = self._detokenizer.push(token).text
        if self._stop:
            self._texts.append(text)
        return self._release(text)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._detokenizer.finish())
        if self.stopped_by is not None:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        held = self._held + text
        self._length += len(text)
        found = [(held.find(stop), stop) for stop in self._stop if stop in held]
        if found:
            at, self.stopped_by = min(found)
            self._held = ""
            self._length -= len(held) - at
            return held[:at]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
