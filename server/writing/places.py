"""Where a passage stands in the messages that were sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ENDS = "\ufffd"  # of a passage that begins or ends within a character


def place_of(passage: str, position: float, texts: Sequence[str]) -> dict[str, Any] | None:
    """``message``, and ``start`` and ``end`` in characters of its text; None where it is not in one of them.

    Args:
        position: how far into the prompt it begins, 0 to 1: which one is meant where the same words stand twice.
        texts: of the messages.
    """
    wanted = passage.strip(_ENDS)
    if not wanted.strip():
        return None
    expected, found = position * sum(map(len, texts)), []
    for number, text in enumerate(texts):
        near = min(max(0, round(expected)), len(text))
        for start in (text.find(wanted, near), text.rfind(wanted, 0, near + len(wanted))):
            if start >= 0:
                place = {"message": number, "start": start, "end": start + len(wanted)}
                found.append((abs(start - expected), place))
        expected -= len(text)
    return min(found, key=lambda one: one[0])[1] if found else None
