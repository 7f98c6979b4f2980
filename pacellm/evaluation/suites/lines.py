"""Published files of samples: an object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pacellm.errors import ConfigError


def read_lines(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file.

    Args:
        fields: that each must have.

    Raises:
        ConfigError: it cannot be read, is no JSON lines, or a line lacks a field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="data") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is no JSON: {error}", param="data") from None
        if not isinstance(one, dict) or (missing := [name for name in fields if name not in one]):
            raise ConfigError(f"{path}, line {number} is no object with {', '.join(fields)}"
                              + (f": {', '.join(missing)} missing" if isinstance(one, dict) else ""),
                              param="data")  # fmt: skip
        found.append(one)
    return found


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
