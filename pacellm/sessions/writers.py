"""Which tokens last wrote a slot: a slot's stamp is the number of a write, and a log tells which tokens each write was.

A write is a segment of a prompt, all tokens of which it is made of, or one decoded token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pacellm.modes import writes
from pacellm.sessions.turn import Turn


@dataclass(frozen=True)
class Write:
    """One write.

    Attributes:
        stamp: its number.
        turn: number of the turn in the log.
        start, end: positions of its tokens as they were fed.
        decoded: the token was one of an answer.
        ids: the first of its tokens.
    """

    stamp: int
    turn: int
    start: int
    end: int
    decoded: bool
    ids: tuple[int, ...]


def writes_of(log: Iterable[Turn], clock: int, stamps: Collection[int], segment: int, *, most: int) -> dict[int, Write]:
    """Writes by stamp, as far as the log has them.

    Args:
        log: turns in order.
        clock: writes before the first of them.
        stamps: that are asked for.
        segment: prompt tokens that are written together.
        most: tokens that are told of each.
    """
    wanted, found = frozenset(stamps), {}
    for number, turn in enumerate(log):
        if not writes(turn.pa):
            continue
        for piece in turn.pieces(0, len(turn.ids), 0, segment):
            if not piece.ends:
                continue
            clock += 1
            if clock in wanted:
                ids = tuple(turn.ids[piece.start : min(piece.stop, piece.start + most)])
                start, end = turn.start + piece.start, turn.start + piece.stop
                found[clock] = Write(clock, number, start, end, start >= turn.prompt_end, ids)
    return found
