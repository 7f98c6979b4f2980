"""What a GGUF file says of itself: read here with ``struct`` alone, so that a wrong file is refused before torch loads.

The format: magic, version, counts of tensors and keys; keys with typed values; names, shapes, types and offsets of
tensors; their data (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pacellm.errors import ModelError

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_ITEMS, _MOST_TENSORS = 2**16, 2**22, 2**20  # more is damage: reading on would take forever

# ggml's number of a type -> numbers of a block, bytes of a block; those that are read as weights
TYPES = {
    0: (1, 4), 1: (1, 2), 30: (1, 2),  # F32, F16, BF16
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),  # Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),  # Q2_K to Q6_K
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),  # IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ4_NL
    21: (256, 110), 22: (256, 82), 23: (256, 136), 29: (256, 56),  # IQ3_S, IQ2_S, IQ4_XS, IQ1_M
    34: (256, 54), 35: (256, 66), 39: (32, 17),  # TQ1_0, TQ2_0, MXFP4
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor.

    Attributes:
        shape: fastest dimension first, as the file has it.
        kind: ggml's number of its type.
        offset: in bytes, from where the data begin.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes that they take in the file."""
        numbers, size = TYPES[self.kind]
        return self.size // numbers * size


@dataclass(frozen=True)
class Header:
    """All but the data.

    Attributes:
        metadata: keys to numbers, strings and lists of them.
        data: where tensors begin, in bytes.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    data: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def own_keys(self) -> dict[str, Any]:
        """What the file says of its architecture, by the keys below that."""
        begin = f"{self.architecture}."
        return {key.removeprefix(begin): value for key, value in self.metadata.items() if key.startswith(begin)}


def is_gguf(path: str | Path) -> bool:
    """A file is meant that is, or is called, a GGUF file."""
    file = Path(path).expanduser()
    if not file.is_file():
        return file.suffix == ".gguf" and not file.is_dir()
    try:
        with file.open("rb") as opened:
            return file.suffix == ".gguf" or opened.read(4) == b"GGUF"
    except OSError:
        return file.suffix == ".gguf"


def find(path: str | Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a directory without a config.json.

    Raises:
        ModelError: the directory holds several.
    """
    place = Path(path).expanduser()
    if is_gguf(place):
        return place
    if not place.is_dir() or (place / "config.json").exists():
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{path} holds several GGUF files; give one of them: {', '.join(file.name for file in files)}")
    return files[0] if files else None


def read_header(file: Path) -> Header:
    """The header, with what it says of the data checked against the file's length.

    Raises:
        ModelError: there is no such file, it is none of this format, damaged, or cut short.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ModelError(f"{file} does not begin as a GGUF file does; it is damaged, or something else")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view:
                header = _Reader(file, view).header()
                _check_data(header, len(view))
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    return header


def _check_data(header: Header, length: int) -> None:
    end = header.data
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        start = header.data + tensor.offset
        if start < end:
            raise ModelError(f"{header.file} is damaged: {tensor.name} lies within another tensor")
        end = start + tensor.bytes
        if end > length:
            raise ModelError(
                f"{header.file} is cut short: {tensor.name} ends at byte {end:,}, the file at {length:,}; "
                f"download it again"
            )


class _Reader:
    """Walks over a header.

    Args:
        view: the file's bytes.
    """

    def __init__(self, file: Path, view: mmap.mmap) -> None:
        self._file, self._view, self._at = file, view, 4

    def header(self) -> Header:
        try:
            return self._header()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._damaged(f"what begins at byte {self._at:,} is not whole") from error

    def _header(self) -> Header:
        (version,) = self._take("<I")
        if version not in _VERSIONS:
            raise ModelError(f"{self._file} is GGUF version {version}; 2 and 3 are read here, little-endian")
        num_tensors, num_keys = self._take("<QQ")
        if num_keys > _MOST_KEYS or num_tensors > _MOST_TENSORS:
            raise self._damaged(f"it claims {num_keys:,} keys and {num_tensors:,} tensors")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(*self._take("<I"))
        tensors = tuple(self._tensor() for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        return Header(self._file, metadata, tensors, -(-self._at // alignment) * alignment)

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self._view, self._at)
        self._at += struct.calcsize(form)
        return found

    def _string(self) -> str:
        (length,) = self._take("<Q")
        end = self._at + length
        if end > len(self._view):
            raise self._damaged(f"a text of {length:,} bytes at byte {self._at:,} goes beyond its end")
        text = self._view[self._at : end].decode()
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take("<" + _SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"at byte {self._at:,} (a value of type {kind})")
        item, count = self._take("<IQ")
        if count > _MOST_ITEMS or item not in (*_SCALARS, _STRING):
            raise self._damaged(f"at byte {self._at:,} (a list of {count:,} values of type {item})")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        return list(self._take(f"<{count}{_SCALARS[item]}"))

    def _tensor(self) -> TensorInfo:
        name = self._string()
        (num_dims,) = self._take("<I")
        if not 1 <= num_dims <= 4:
            raise self._damaged(f"tensor {name!r} has {num_dims} dimensions")
        shape = self._take(f"<{num_dims}Q")
        kind, offset = self._take("<IQ")
        if kind not in TYPES:
            raise ModelError(f"{self._file}: {name} holds numbers of ggml's type {kind}, which is not read here")
        if 0 in shape or shape[0] % TYPES[kind][0]:
            raise self._damaged(f"tensor {name!r} of type {kind} has the shape {shape}")
        return TensorInfo(name, shape, kind, offset)

    def _damaged(self, how: str) -> ModelError:
        return ModelError(f"{self._file} is damaged or cut short: {how}; download it again")
