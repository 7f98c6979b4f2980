"""What JSON would cost once it is parsed, from its bytes alone: nothing is made, and the interpreter is not held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pacellm.errors import BodyTooLarge, RequestError

MAX_DEPTH = 128  # parsers go down to 200
MAX_PAIRS = 2**17  # of all objects together
MIN_PARSED = 64 * 2**20  # bytes that any body may come to
_BLOCK = 2**18  # bytes looked at in one go
# bytes of a number or a short string in a list, and of a small object of the schema; measured with pydantic
_VALUE, _CONTAINER = 40, 1024
_QUOTE, _COMMA, _COLON, _OPEN, _CLOSE, _NUM_KINDS = 1, 2, 3, 4, 5, 6
_KINDS = np.zeros(256, np.uint8)
for _kind, _bytes in ((_QUOTE, b'"'), (_COMMA, b","), (_COLON, b":"), (_OPEN, b"[{"), (_CLOSE, b"]}")):
    _KINDS[list(_bytes)] = _kind


@dataclass
class JsonShape:
    """What a JSON text is made of.

    Attributes:
        depth: of nesting.
        values: numbers, strings and containers, at most one more than there are. pairs: keys of all objects.
        containers: objects and lists.
        characters: of the text. escaped: those that escapes save when they are read.
        width: bytes of a character in memory, by the widest that an escape stands for. widest: of those that need none.
    """

    depth: int = 0
    values: int = 1
    pairs: int = 0
    containers: int = 0
    characters: int = 0
    escaped: int = 0
    width: int = 1
    widest: int = 1

    @property
    def parsed_bytes(self) -> int:
        """Bytes of what is made of it, from above."""
        text = max(self.characters * self.widest, (self.characters - self.escaped) * max(self.width, self.widest))
        return text + _VALUE * self.values + _CONTAINER * self.containers


class _Scan:
    """Reads blocks of one body."""

    def __init__(self, body: bytes | bytearray) -> None:
        self._whole = np.frombuffer(body, np.uint8)
        self.shape = JsonShape()
        self._depth, self._inside, self._carry = 0, 0, 0  # carry: the last block's end escapes the first byte

    def blocks(self) -> range:
        """Where blocks begin."""
        return range(0, len(self._whole), _BLOCK)

    def read(self, start: int) -> None:
        """Add a block to the shape."""
        block, shape = self._whole[start : start + _BLOCK], self.shape
        kinds = _KINDS[block]
        escaped = self._escapes(block)
        kinds[escaped] = 0
        self._measure(block, start + escaped)
        found = kinds[np.flatnonzero(kinds)]
        quotes = found == _QUOTE
        inside = (np.cumsum(quotes, dtype=np.int64) + self._inside) & 1
        self._inside = int(inside[-1]) if len(inside) else self._inside
        outside = found[(inside == 0) & ~quotes]
        counts = np.bincount(outside, minlength=_NUM_KINDS)
        shape.values += int(counts[_COMMA] + counts[_OPEN])
        shape.pairs += int(counts[_COLON])
        shape.containers += int(counts[_OPEN])
        steps = (outside == _OPEN).astype(np.int64) - (outside == _CLOSE)
        if len(steps):
            depths = self._depth + np.cumsum(steps)
            shape.depth, self._depth = max(shape.depth, int(depths.max())), int(depths[-1])

    def _escapes(self, block: Any) -> Any:
        """Places of a block's characters that stand behind a backslash."""
        slashes = np.flatnonzero(block == ord("\\"))
        lead = [0] if self._carry else []
        if not len(slashes):
            self._carry = 0
            return np.array(lead, np.int64)
        begins = np.concatenate(([True], np.diff(slashes) != 1))
        first = slashes[begins][np.cumsum(begins) - 1]  # of each one's run
        order = slashes - first + (self._carry & (first == 0))
        behind = slashes[order % 2 == 0] + 1
        if self._carry and slashes[0] == 0:
            lead = [0]
        self._carry = int(len(behind) > 0 and behind[-1] == len(block))
        return np.concatenate((np.array(lead, np.int64), behind[behind < len(block)]))

    def _measure(self, block: Any, escaped: Any) -> None:
        """Count characters and find the widest.

        Args:
            escaped: places in the whole.
        """
        shape, top = self.shape, int(block.max())
        shape.characters += int(np.count_nonzero((block & 0xC0) != 0x80)) if top >= 0x80 else len(block)
        shape.widest = max(shape.widest, 4 if top >= 0xF0 else 2 if top >= 0xC4 else 1)
        codes = escaped[self._whole[escaped] == ord("u")]
        shape.escaped += len(escaped) + 4 * len(codes)
        if not len(codes):
            return
        end = len(self._whole) - 1
        high, low = self._whole[np.minimum(codes + 1, end)] | 0x20, self._whole[np.minimum(codes + 2, end)] | 0x20
        is_pair = (high == ord("d")) & ((low == ord("8")) | (low == ord("9")) | (low >= ord("a")))
        is_wide = (high != ord("0") | 0x20) | (low != ord("0") | 0x20)
        shape.width = max(shape.width, 4 if bool(is_pair.any()) else 2 if bool(is_wide.any()) else 1)


def shape_of(body: bytes | bytearray, limit: int | None = None) -> JsonShape:
    """A body's shape; what is no JSON has one too.

    Args:
        limit: bytes that it may come to when it is parsed, at least ``MIN_PARSED``; None lets everything pass.

    Raises:
        RequestError: nested too deep, or too many keys. BodyTooLarge: it would come to more.
    """
    scan = _Scan(body)
    for start in scan.blocks():
        scan.read(start)
        if limit is not None:
            _check(scan.shape, max(limit, MIN_PARSED))
    return scan.shape


def _check(shape: JsonShape, limit: int) -> None:
    if shape.depth > MAX_DEPTH:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels", code="body_too_complex")
    if shape.pairs > MAX_PAIRS:
        raise RequestError(f"the objects of the body have more than {MAX_PAIRS:,} keys", code="body_too_complex")
    if shape.parsed_bytes > limit:
        found = f"{shape.values:,} values, {shape.containers:,} objects and lists, {shape.characters:,} characters"
        width = max(shape.width, shape.widest)
        raise BodyTooLarge(
            f"the body would take more than {limit:,} bytes once it is read: {found} of {width} bytes so far",
            code="body_too_complex",
        )
