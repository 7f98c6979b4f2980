"""Text to ids piece by piece, remembering long pieces: a follow-up on a long document encodes what is new only.

Special tokens cut a text into pieces that a tokenizer encodes apart. Whether that holds for a tokenizer is measured
once (:attr:`PieceMemo.is_exact`); where it does not, nothing is remembered.
"""

from __future__ import annotations

import hashlib
import re
import threading
from array import array
from collections import OrderedDict

from tokenizers import Tokenizer

_LONG = 2000  # characters; shorter pieces are encoded faster than looked up
_SAMPLES = ("a b", " a b ", "\na\n\nb\n", "Ünïcödé 漢字 123", "x", " ", "\n", "## 4.5e-3;\tend.")


class PieceMemo:
    """Encodes rendered prompts.

    Args:
        backend: a fast tokenizer's backend.
        max_tokens: ids remembered in all, 4 bytes each; those used longest ago go first.
    """

    def __init__(self, backend: Tokenizer, max_tokens: int = 8 * 2**20) -> None:
        self._backend, self._max_tokens = backend, max_tokens
        self._known: OrderedDict[tuple[str, bytes], array[int]] = OrderedDict()
        self._num_tokens = 0
        self._lock = threading.Lock()
        special = [token for token in backend.get_added_tokens_decoder().values() if token.special]
        contents = sorted((token.content for token in special), key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, contents)) + ")") if contents else None
        self.is_exact = bool(contents) and not any(token.lstrip or token.rstrip for token in special)
        self.is_exact = self.is_exact and all(self._agrees(content) for content in contents)

    def encode(self, text: str, scope: str | None = None) -> list[int]:
        """Ids of a text, no special tokens added. The interpreter is not held while a piece is encoded.

        Args:
            text: may contain special tokens.
            scope: long pieces are remembered for, and found by, the same scope only; None remembers nothing.
        """
        if scope is None or not self.is_exact or len(text) < _LONG:
            return self._encode(text)
        assert self._cut is not None
        ids: list[int] = []
        for piece in self._cut.split(text):
            if piece:
                ids += self._encode(piece) if len(piece) < _LONG else self._long(piece, scope)
        return ids

    def _long(self, piece: str, scope: str) -> array[int]:
        key = scope, hashlib.blake2b(piece.encode(), digest_size=16).digest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        ids = array("i", self._encode(piece))
        with self._lock:
            if key not in self._known:
                self._known[key] = ids
                self._num_tokens += len(ids)
            while self._num_tokens > self._max_tokens:
                self._num_tokens -= len(self._known.popitem(last=False)[1])
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _agrees(self, special: str) -> bool:
        """Pieces around a special token give what the whole gives."""
        assert self._cut is not None
        text = special.join((*_SAMPLES, *reversed(_SAMPLES)))
        return self._encode(text) == [id_ for piece in self._cut.split(text) if piece for id_ in self._encode(piece)]
