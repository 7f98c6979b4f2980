"""Ids to text, token by token: what each token adds, as bytes, so that texts, log-probabilities and offsets agree.

A token decoded alone is not its text: it may be a part of a character, and some decoders drop the space in front of a
text's first token.
"""

from __future__ import annotations

import codecs
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from pacellm.errors import ModelError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNKNOWN = "\ufffd"
_ANCHORS = ("a", "x", "1", ".")
_TRIALS, _TRIAL_LENGTH = 8, 24


class Vocabulary:
    """The bytes of a tokenizer's tokens.

    Args:
        backend: of a fast tokenizer.

    Raises:
        ModelError: the decoder writes a token differently by what follows it, so that no text could be streamed.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._letters = _byte_letters()
        self.special = frozenset(id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special)
        self._known: dict[tuple[int, bool], bytes] = {}
        self._anchor, self._before = self._find_anchor()
        self._try_out()

    def bytes_of(self, token: int, *, is_first: bool = False) -> bytes:
        """What a token adds to a text, special ones as they are written.

        Args:
            is_first: of a text's tokens.
        """
        key = token, is_first
        if (found := self._known.get(key)) is None:
            found = self._known[key] = self._find(token, is_first)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """A whole text, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        first = self.bytes_of(ids[0], is_first=True) if ids else b""
        return b"".join([first, *map(self.bytes_of, ids[1:])]).decode(errors="replace")

    def _find(self, token: int, is_first: bool) -> bytes:
        before = [] if is_first or self._anchor is None else [self._anchor]
        text = self._decode([*before, token])
        text = text[len(self._before) :] if before else text
        return self._raw(token, text) if _UNKNOWN in text else text.encode()

    def _raw(self, token: int, text: str) -> bytes:
        """Of a token that has no text of its own."""
        written = self._backend.id_to_token(token) or ""
        if (byte := _BYTE.fullmatch(written)) is not None:
            return bytes([int(byte[1], 16)])
        if written and all(letter in self._letters for letter in written):
            return bytes(self._letters[letter] for letter in written)
        return text.encode()

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _find_anchor(self) -> tuple[int | None, str]:
        """A token behind which others are looked at, and its text."""
        for text in _ANCHORS:
            ids = self._backend.encode(text, add_special_tokens=False).ids
            if ids and (found := self._decode(ids[-1:])) and self._decode(2 * ids[-1:]).startswith(found):
                return ids[-1], found
        return None, ""

    def _try_out(self) -> None:
        size, rng = self._backend.get_vocab_size(), random.Random(0)
        whole = [id_ for id_ in rng.sample(range(size), min(size, 512)) if self._is_whole(id_)]
        for _ in range(_TRIALS if whole else 0):
            ids = rng.choices(whole, k=_TRIAL_LENGTH)
            found = b"".join(self.bytes_of(id_, is_first=not place) for place, id_ in enumerate(ids)).decode()
            if found != self._decode(ids):
                raise ModelError(
                    "the tokenizer's decoder writes a token differently by what stands around it; such texts cannot be "
                    "streamed"
                )

    def _is_whole(self, token: int) -> bool:
        return _BYTE.fullmatch(self._backend.id_to_token(token) or "<0x00>") is None and _is_text(self.bytes_of(token))


class Token(NamedTuple):
    """One token's part of a text: ``text`` is "" where a character is not complete, and comes with its last token."""

    text: str
    bytes: bytes


class Detokenizer:
    """One text, as it grows.

    Args:
        vocabulary: of the tokenizer.
        skip_special: leave special tokens out.
        is_start: nothing stands before the text.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = True, is_start: bool = True) -> None:
        self._vocabulary, self._skip_special, self._is_first = vocabulary, skip_special, is_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, *, is_last: bool = False) -> Token:
        """Add a token; bytes that are no UTF-8 become U+FFFD as soon as that is certain, and with the last token."""
        if self._skip_special and token in self._vocabulary.special:
            return Token(self.finish() if is_last else "", b"")
        found = self._vocabulary.bytes_of(token, is_first=self._is_first)
        self._is_first = False
        return Token(self._utf8.decode(found, is_last), found)

    def finish(self) -> str:
        """What is left of a character that never was complete."""
        return self._utf8.decode(b"", True)

    def peek(self, token: int) -> Token:
        """What a token would add. One that would not complete a character is written ``bytes:\\xf0``, as by OpenAI."""
        found = self._vocabulary.bytes_of(token, is_first=self._is_first)
        state = self._utf8.getstate()
        text = self._utf8.decode(found)
        self._utf8.setstate(state)
        if found and not text:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
        return Token(text, found)


def _is_text(found: bytes) -> bool:
    try:
        return _UNKNOWN not in found.decode()
    except UnicodeDecodeError:
        return False


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
    assert letters.keys() == set(ByteLevel.alphabet())
    return letters
