"""Bodies that were sent compressed, read piece by piece so that none is unpacked beyond its limit."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from pacellm.errors import RequestError, UnsupportedEncoding

_PIECE = 256 * 1024  # bytes unpacked in one go: about a millisecond
_GZIP, _ZLIB, _BARE = 31, 15, -15  # what zlib calls the three
_NAMES = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}


class Plain:
    """A body as it is."""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What more of the body comes to."""
        yield data

    def close(self) -> None:
        """It is whole."""


class Inflated:
    """A body behind gzip (one or several members) or deflate (with zlib's head, or without).

    Args:
        name: "gzip" or "deflate".
    """

    def __init__(self, name: str) -> None:
        self._name, self._head = name, b""
        self._reader: zlib._Decompress | None = None

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What more of the body comes to, at most 256 KiB at a time; whoever stops asking stops the unpacking.

        Raises:
            RequestError: it is not what the header says.
        """
        if self._reader is None:
            self._head = data = self._head + data
            if len(data) < 2:
                return
            self._reader = zlib.decompressobj(_GZIP if self._name == "gzip" else _window(data))
        reader, is_full = self._reader, False
        while data or is_full:
            if reader.eof:
                reader = self._reader = self._following(data)
            piece = self._unpacked(reader, data)
            data, is_full = reader.unused_data or reader.unconsumed_tail, len(piece) == _PIECE and not reader.eof
            yield piece

    def close(self) -> None:
        """It is whole.

        Raises:
            RequestError: it is cut short.
        """
        if self._head and not (self._reader is not None and self._reader.eof):
            raise self._problem("it ends too early")

    def _following(self, data: bytes) -> zlib._Decompress:
        """For what comes behind a whole one: gzip may go on with another member."""
        if self._name != "gzip":
            raise self._problem("something follows its end")
        return zlib.decompressobj(_GZIP)

    def _unpacked(self, reader: zlib._Decompress, data: bytes) -> bytes:
        try:
            return reader.decompress(data, _PIECE)
        except zlib.error as error:
            raise self._problem(str(error)) from None

    def _problem(self, what: str) -> RequestError:
        return RequestError(f"the body is not valid {self._name}: {what}", param="Content-Encoding",
                            code="invalid_encoding")  # fmt: skip


def _window(data: bytes) -> int:
    """Whether deflate has zlib's head, which many senders leave out."""
    return _ZLIB if data[0] & 0x0F == 8 and int.from_bytes(data[:2]) % 31 == 0 else _BARE


def decoder_of(header: str) -> Plain | Inflated:
    """What reads a body.

    Args:
        header: its Content-Encoding; "" where there is none.

    Raises:
        UnsupportedEncoding: another one, or several.
    """
    names = [name for name in (part.strip().lower() for part in header.split(",")) if name not in ("", "identity")]
    if not names:
        return Plain()
    if len(names) > 1 or names[0] not in _NAMES:
        raise UnsupportedEncoding(
            f"Content-Encoding {header[:80]!r} is not supported; send the body with gzip, with deflate, or as it is",
            param="Content-Encoding",
        )
    return Inflated(_NAMES[names[0]])
