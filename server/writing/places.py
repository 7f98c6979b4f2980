"""Where a passage stands in what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_ENDS = "\ufffd"  # of a passage that begins or ends within a character


class Sent(NamedTuple):
    """Texts that came with a request.

    Attributes:
        name: what one of them is: a ``message``, an item of ``input``, a ``prompt``.
        texts: in the order that was sent; those that have none are empty.
        first: number of the first.
    """

    name: str
    texts: Sequence[str] = ()
    first: int = 0


NOTHING = Sent("message")


def place_of(passage: str, position: float, sent: Sent) -> dict[str, Any] | None:
    """By the name of what was sent its number, and ``start`` and ``end`` in characters of its text; None where the
    passage is in none of them.

    Args:
        position: how far into the prompt it begins, 0 to 1: which one is meant where the same words stand twice.
        sent: where to look.
    """
    wanted = passage.strip(_ENDS)
    if not wanted.strip():
        return None
    expected, found = position * sum(map(len, sent.texts)), []
    for number, text in enumerate(sent.texts, start=sent.first):
        near = min(max(0, round(expected)), len(text))
        for start in (text.find(wanted, near), text.rfind(wanted, 0, near + len(wanted))):
            if start >= 0:
                place = {sent.name: number, "start": start, "end": start + len(wanted)}
                found.append((abs(start - expected), place))
        expected -= len(text)
    return min(found, key=lambda one: one[0])[1] if found else None
