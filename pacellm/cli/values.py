"""How flags are read."""

from __future__ import annotations

import argparse
import json
from typing import Literal, cast

from pacellm.config import INDEXES, IndexName

LEAST_DOCUMENT = 1000  # tokens
_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def size(text: str) -> int:
    """An integer with an optional K, M, G or T (powers of 1,024)."""
    unit = _UNITS.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * unit) if unit else int(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 200000 or 8G") from None


def json_object(text: str) -> dict[str, object]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


def seconds(text: str) -> float:
    """A number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return found


def at_least_one(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def port(text: str) -> int:
    """A TCP port; 0 is a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; ports are 0 (a free one) to 65535")
    return int(text)


def document_size(text: str) -> int:
    """Tokens of a document that has something to ask about."""
    found = size(text)
    if found < LEAST_DOCUMENT:
        raise argparse.ArgumentTypeError(f"{text!r} is too short for a document with facts; give {LEAST_DOCUMENT:,} "
                                         "tokens or more")  # fmt: skip
    return found


def layers(text: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers; write it as 1,3") from None


def layers_or_auto(text: str) -> tuple[int, ...] | Literal["auto"]:
    """The same, or ``auto``."""
    return "auto" if text == "auto" else layers(text)


def indexes(text: str) -> tuple[IndexName, ...]:
    """Names of indexes with commas between, each once."""
    found = tuple(text.split(","))
    if not set(found) <= set(INDEXES) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of indexes; write it as {','.join(INDEXES[:2])}, of "
                                         f"{', '.join(INDEXES)}")  # fmt: skip
    return cast(tuple[IndexName, ...], found)
