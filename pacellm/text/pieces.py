"""Text to ids piece by piece, remembering long pieces: a follow-up on a long document encodes what is new only.

Tokens that are no text cut a text into pieces that a tokenizer encodes apart. Whether that holds for a tokenizer is
measured once (:attr:`PieceMemo.is_exact`); where it does not, nothing is remembered.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pacellm.errors import ContextLengthExceeded

_COUNTED = 2**20  # bytes; longer texts are counted in windows first: encoding takes 160 bytes of memory a byte
_WINDOW = 2**17  # characters
_SEAM = 64  # tokens that cutting a window out may add
_LONG = 2000  # characters; shorter pieces are encoded faster than looked up
_SAMPLES = ("a b", " a b ", "\na\n\nb\n", "Ünïcödé 漢字 123", "x", " ", "\n", "## 4.5e-3;\tend.")


def pattern_of(texts: Iterable[str]) -> str:
    """A regular expression of any of the texts, the longest first; fast however many they are."""
    root: dict[str, Any] = {}
    for text in texts:
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[""] = None

    def written(node: dict[str, Any]) -> str:
        branches = [re.escape(character) + written(below) for character, below in node.items() if character]
        if not branches:
            return ""
        body = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return f"(?:{body})?" if "" in node else body

    return written(root) or "(?!)"


class Pieces:
    """A tokenizer, and what cuts its texts.

    Args:
        backend: a fast tokenizer's backend.
        cuts: its tokens that are no text.
    """

    def __init__(self, backend: Tokenizer, cuts: Iterable[str]) -> None:
        self._backend, self._cut = backend, re.compile(f"({pattern_of(cuts)})")

    def of(self, text: str) -> Iterator[str]:
        """A text's pieces, the tokens among them."""
        return (piece for piece in self._cut.split(text) if piece)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Ids of a text, no special tokens added. The interpreter is not held meanwhile.

        Args:
            limit: refuse a long text with more tokens before it is encoded as a whole.

        Raises:
            ContextLengthExceeded: it has more.
        """
        self.check(text, limit)
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def check(self, text: str, limit: int | None) -> None:
        """Refuse a long text that has too many tokens, by the counts of its parts.

        Raises:
            ContextLengthExceeded: it has more than ``limit``.
        """
        if limit is None or _num_bytes(text) <= _COUNTED:
            return
        at_least = 0
        for start in range(0, len(text), _WINDOW):
            window = text[start : start + _WINDOW]
            at_least += len(self._backend.encode_batch_fast([window], add_special_tokens=False)[0]) - _SEAM
            if at_least > limit:
                raise too_long(at_least, limit)


def too_long(at_least: int, limit: int) -> ContextLengthExceeded:
    """The refusal of a text that has too many tokens for certain."""
    return ContextLengthExceeded(
        f"the text has more than {at_least:,} tokens; {limit:,} are the most that it may have here", param="messages"
    )


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class PieceMemo:
    """Encodes rendered prompts.

    Args:
        backend: a fast tokenizer's backend.
        tokens: its tokens that are no text.
        max_tokens: ids remembered in all, 4 bytes each; those used longest ago go first.
    """

    def __init__(self, backend: Tokenizer, tokens: Iterable[AddedToken], max_tokens: int = 8 * 2**20) -> None:
        self._max_tokens = max_tokens
        self._known: OrderedDict[tuple[str, bytes], array[int]] = OrderedDict()
        self._num_tokens = 0
        self._lock = threading.Lock()
        tokens = list(tokens)
        contents = [token.content for token in tokens]
        self._pieces = Pieces(backend, contents)
        self.is_exact = bool(tokens) and not any(token.lstrip or token.rstrip or token.single_word for token in tokens)
        self.is_exact = self.is_exact and self._agrees(contents)

    def encode(
        self, text: str, scope: str | None = None, pieces: Pieces | None = None, *, limit: int | None = None
    ) -> list[int]:
        """Ids of a text, no special tokens added. The interpreter is not held while a piece is encoded.

        Args:
            text: may contain special tokens.
            scope: long pieces are remembered for, and found by, the same scope only; None remembers nothing.
            pieces: a tokenizer that encodes every piece that is not cut by this one's tokens as this one does.
            limit: as for :meth:`Pieces.encode`.
        """
        pieces = pieces or self._pieces
        if scope is None or not self.is_exact or len(text) < _LONG:
            return pieces.encode(text, limit)
        ids: list[int] = []
        for piece in pieces.of(text):
            ids += pieces.encode(piece) if len(piece) < _LONG else self._long(piece, scope, pieces, limit)
            if limit is not None and len(ids) > limit:
                raise too_long(len(ids), limit)
        return ids

    def check(self, text: str, limit: int | None) -> None:
        """As :meth:`Pieces.check`."""
        self._pieces.check(text, limit)

    def forget(self, scope: str, *, below: bool = False) -> None:
        """Drop what a scope remembers; with ``below`` what every scope whose name begins so does."""
        with self._lock:
            for key in [key for key in self._known if (key[0].startswith(scope) if below else key[0] == scope)]:
                self._num_tokens -= len(self._known.pop(key))

    def _long(self, piece: str, scope: str, pieces: Pieces, limit: int | None) -> array[int]:
        key = scope, hashlib.blake2b(piece.encode(), digest_size=16).digest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        ids = array("i", pieces.encode(piece, limit))
        with self._lock:
            if key not in self._known:
                self._known[key] = ids
                self._num_tokens += len(ids)
            while self._num_tokens > self._max_tokens:
                self._num_tokens -= len(self._known.popitem(last=False)[1])
        return ids

    def _agrees(self, contents: list[str]) -> bool:
        """Pieces around tokens give what the whole gives."""
        times = max(2, 64 // len(contents))
        samples = itertools.cycle((*_SAMPLES, *_SAMPLES[1:]))
        text = "".join(sample + content for sample, content in zip(samples, contents * times, strict=False)) + "a b"
        apart = {piece: self._pieces.encode(piece) for piece in set(self._pieces.of(text))}
        return self._pieces.encode(text) == [id_ for piece in self._pieces.of(text) for id_ in apart[piece]]
