"""Sessions as bytes: safetensors with a keyed digest, and the checks that anything read must pass.

The layout is safetensors' own (8 bytes of length, a JSON header, tensors), written here tensor by tensor so that a
session's KV is never copied as a whole. ``__metadata__`` carries ``tag``, an HMAC-SHA256 under the server's secret
over the header (with the tag's digits zeroed) and the data. Of tensors named ``kv.*`` it covers the sums of every
mebibyte where ``sums`` is set: eight times faster to check, enough against damage, not against forgery; files of the
server's own folder use it, snapshots that clients send may not.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pacellm.errors import SnapshotRefused
from pacellm.memory.expert_counts import EXPERTS
from pacellm.memory.state import Banks, BankState

FORMAT = "pacellm-session-1"
MAX_HEADER = 4 * 2**20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TAG = "0" * 64
_MEBI = 2**20


def write(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str], secret: bytes, *, sums: bool) -> int:
    """Write a snapshot; returns its bytes.

    Args:
        file: binary, written from its position on.
        tensors: contiguous, in host memory.
        metadata: strings; ``format``, ``sums`` and ``tag`` are added.
        secret: key of the tag.
        sums: cover KV by sums only.
    """
    entries: dict[str, Any] = {
        "__metadata__": {**metadata, "format": FORMAT, "sums": "1" if sums else "0", "tag": _TAG}
    }
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]
        }  # fmt: skip
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    tag = _digest(header, ((name, _bytes(tensor)) for name, tensor in tensors.items()), secret, sums)
    header = header.replace(f'"tag":"{_TAG}"'.encode(), f'"tag":"{tag}"'.encode(), 1)
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for tensor in tensors.values():
        file.write(_bytes(tensor))
    return 8 + len(header) + offset


@dataclass
class Parsed:
    """A snapshot whose header was read and whose data was not.

    Attributes:
        tensors: views of the data, in its order.
        metadata: of the header.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    _header: bytes

    def verify(self, secret: bytes, visit: Callable[[str, Tensor], None] = lambda name, tensor: None) -> None:
        """Read all data once and hold it against the tag.

        Args:
            secret: key of the tag.
            visit: called with every tensor just read, before anyone knows whether the whole is good.

        Raises:
            SnapshotRefused: damaged, or not written under this secret.
        """

        def parts() -> Iterator[tuple[str, memoryview]]:
            for name, tensor in self.tensors.items():
                yield name, _bytes(tensor)
                visit(name, tensor)

        found = self.metadata["tag"]
        plain = self._header.replace(f'"tag":"{found}"'.encode(), f'"tag":"{_TAG}"'.encode(), 1)
        tag = _digest(plain, parts(), secret, self.metadata["sums"] == "1")
        if not hmac.compare_digest(tag.encode(), found.encode()):
            raise SnapshotRefused("snapshot is damaged or was not signed by this server (its tag does not match)")


def parse(data: memoryview) -> Parsed:
    """A snapshot's header, and its tensors as views of ``data``, which stays in use as long as they do.

    Raises:
        SnapshotRefused: the header is damaged or does not describe the data; says what is wrong.
    """
    header, entries, metadata, start = _header(data)
    tensors: dict[str, Tensor] = {}
    offset = 0
    for name, entry in entries.items():
        dtype, shape, end = _entry(name, entry, offset, len(data) - start)
        part = data[start + offset : start + end]
        tensors[name] = torch.frombuffer(part, dtype=dtype).reshape(shape) if end > offset else torch.empty(
            shape, dtype=dtype
        )  # fmt: skip
        offset = end
    if offset != len(data) - start:
        raise SnapshotRefused(f"snapshot has {len(data) - start:,} bytes of data where {offset:,} are described")
    return Parsed(tensors, metadata, header)


def read(data: memoryview, secret: bytes, *, trust_unsigned: bool = False, whole: bool = False):
    """A snapshot's tensors, as views of ``data``, and its metadata.

    Args:
        data: the whole snapshot; stays in use as long as the tensors do.
        secret: key of the tag.
        trust_unsigned: accept any tag; structure is checked all the same.
        whole: refuse a tag that covers KV by sums.

    Raises:
        SnapshotRefused: damaged, or not written under this secret; says what is wrong.
    """
    parsed = parse(data)
    if whole and parsed.metadata["sums"] == "1" and not trust_unsigned:
        raise SnapshotRefused("snapshot is a file of a session folder; export it over the API instead")
    if not trust_unsigned:
        parsed.verify(secret)
    return parsed.tensors, parsed.metadata


def metadata_of(file: BinaryIO) -> dict[str, str]:
    """A snapshot's metadata, from its header alone; nothing is verified.

    Raises:
        SnapshotRefused: the header is damaged.
    """
    first = file.read(8)
    length = int.from_bytes(first, "little")
    return _header(memoryview(first + file.read(min(length, MAX_HEADER + 1))))[2]


def _header(data: memoryview) -> tuple[bytes, dict[str, Any], dict[str, str], int]:
    if len(data) < 8:
        raise SnapshotRefused(f"snapshot is truncated: {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER or length > len(data) - 8:
        raise SnapshotRefused(f"snapshot's header claims {length:,} bytes")
    header = bytes(data[8 : 8 + length])
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise SnapshotRefused(f"snapshot's header is not JSON: {type(error).__name__}") from None
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    return header, entries, _checked(metadata), 8 + length


def _checked(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SnapshotRefused("snapshot has no metadata")
    if metadata.get("format") != FORMAT or "tag" not in metadata or metadata.get("sums") not in ("0", "1"):
        raise SnapshotRefused(f"snapshot's format is {metadata.get('format', 'unnamed')[:40]!r}, not {FORMAT!r}")
    return metadata


def _entry(name: str, entry: Any, offset: int, available: int) -> tuple[torch.dtype, list[int], int]:
    """(dtype, shape, end of its data) of a header's entry, which must begin at ``offset``."""
    try:
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sizes_are_good = all(type(size) is int and 0 <= size < 2**40 for size in [*shape, begin, end])
    except (KeyError, TypeError, ValueError):
        raise SnapshotRefused(f"snapshot's entry {name[:40]!r} is malformed") from None
    numbers = 1
    for size in shape if sizes_are_good else ():
        numbers *= size
    if not sizes_are_good or begin != offset or end > available or end - begin != numbers * dtype.itemsize:
        raise SnapshotRefused(f"snapshot's entry {name[:40]!r} does not describe its data")
    return dtype, shape, end


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.nbytes:
        return memoryview(b"")
    numbers: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def _digest(header: bytes, parts: Iterable[tuple[str, memoryview]], secret: bytes, sums: bool) -> str:
    digest = hmac.new(secret, header, hashlib.sha256)
    for name, part in parts:
        if sums and name.startswith("kv."):
            digest.update(_sums(part))
        else:
            digest.update(part)
    return digest.hexdigest()


def _sums(part: memoryview) -> bytes:
    """Sums of 64-bit words, one for every mebibyte and one for the rest, and the rest's last bytes."""
    if len(part) < 8:
        return bytes(part)
    words = np.frombuffer(part, dtype=np.uint64, count=len(part) // 8)
    per_sum = _MEBI // 8
    full = words[: len(words) // per_sum * per_sum].reshape(-1, per_sum)
    rest = words[full.size :]
    return full.sum(1).tobytes() + rest.sum(keepdims=True).tobytes() + bytes(part[len(words) * 8 :])


# -- banks -------------------------------------------------------------------------------------------------


def bank_tensors(prefix: str, banks: Banks) -> dict[str, Tensor]:
    """Banks as named tensors, ``prefix.LAYER.FIELD``."""
    return {
        f"{prefix}.{layer}.{field}": tensor
        for layer, bank in banks.items()
        for field, tensor in zip(bank._fields, bank, strict=True)
    }


def take_banks(prefix: str, tensors: dict[str, Tensor], like: Banks) -> Banks:
    """The inverse of :func:`bank_tensors`: checked copies, or {} where there are none; takes them out of ``tensors``.

    Args:
        like: banks whose layers, shapes and dtypes are the right ones.

    Raises:
        SnapshotRefused: layers, shapes, dtypes or values that cannot be a bank of this server.
    """
    if not any(name.startswith(f"{prefix}.") for name in tensors):
        return {}
    found: Banks = {}
    for layer, wanted in like.items():
        parts = []
        for field, pattern in zip(wanted._fields, wanted, strict=True):
            tensor = tensors.pop(f"{prefix}.{layer}.{field}", None)
            if tensor is None or tensor.shape != pattern.shape or tensor.dtype != pattern.dtype:
                raise SnapshotRefused(f"snapshot's {prefix}.{layer}.{field} is missing or of another shape")
            parts.append(tensor.clone())
        found[layer] = type(wanted)(*parts)
        (_check_activity if layer == EXPERTS else _check_bank)(f"{prefix}.{layer}", found[layer])
    return found


def _check_bank(name: str, bank: BankState) -> None:
    """Every number must be one that a bank can hold: reads index by them."""
    slots, clock = bank.keys.shape[0], int(bank.clock)
    if not (torch.isfinite(bank.keys).all() and torch.isfinite(bank.values).all()):
        raise SnapshotRefused(f"snapshot's {name} has numbers that are not finite")
    counts = [bank.usage, bank.stamp, bank.counters, bank.clock, bank.filled]
    if any(bool((count < 0).any()) or bool((count > 2**53).any()) for count in counts):
        raise SnapshotRefused(f"snapshot's {name} has counts that cannot be")
    if int(bank.filled) > slots or bool((bank.stamp > clock).any()):
        raise SnapshotRefused(f"snapshot's {name} contradicts itself")


def _check_activity(name: str, state: Any) -> None:
    if bool((state.activity < 0).any()) or bool((state.activity > 2**60).any()):
        raise SnapshotRefused(f"snapshot's {name} has counts that cannot be")


def fingerprint(weights: Iterable[tuple[str, Tensor]], facts: dict[str, Any]) -> str:
    """What a session's state depends on, as 64 hex digits: weights to the bit, and ``facts`` (JSON values)."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor.detach().cpu()))
    return digest.hexdigest()
