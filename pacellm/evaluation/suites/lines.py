"""Published files of samples: an object a line. Long ones are read again when they are asked, not kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pacellm.errors import ConfigError


def read_lines(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with where it begins, in bytes.

    Args:
        fields: that each must have.

    Raises:
        ConfigError: it cannot be read, is no JSON lines, or a line lacks a field.
    """
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield start, _parsed(line, fields, f"{path}, line {number}")
                start += len(line)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="data") from None


def read_at(path: Path, start: int) -> dict[str, Any]:
    """The object that begins there."""
    with path.open("rb") as file:
        file.seek(start)
        return json.loads(file.readline())


def digest(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _parsed(line: bytes, fields: Sequence[str], place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is no JSON: {error}", param="data") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{place} is no object", param="data")
    if missing := [name for name in fields if name not in found]:
        raise ConfigError(f"{place} lacks {', '.join(missing)}", param="data")
    return found
