"""How much of prompts a step may take, by what it has cost of late.

A prompt token's cost grows with its position: behind 200,000 tokens it is many times that behind 1,000. So a step has
seconds for prompts, and a chunk of a prompt is priced by where it lies. Cuts change no answer, so the clock may decide
them.
"""

from __future__ import annotations

from collections.abc import Iterable

from pacellm.rows import ROWS

SHARE = 1.75  # chunks of prompts in a step may take this many times what its decoding takes
LONGEST = 2.0  # seconds of a step that decodes nothing: who arrives meanwhile waits for its end
SEVERAL = 0.5  # seconds of such a step with several prompts: the shortest waits for its first token
_KEPT = 0.6  # of an estimate, at each observation
_FRESH = 64  # steps after which the next one only decodes, to see what that takes by now
_DEEP = (
    32_768.0  # tokens: the unit of positions, so that deep chunks teach what depth costs and others what a token does
)


class Pace:
    """Running estimates of what steps cost, in seconds.

    Args:
        most: tokens that one sees at most, wherever it stands; None is all before it.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self.decode: float | None = None  # a step that only decodes
        self._token = self._depth = 0.0  # a prompt token, and what it takes more for every ``_DEEP`` before it
        self._saved = 0.0  # seconds that chunks have coming which were too long for a step
        self._age = 0  # steps that decoded beside prompts since one only decoded

    def observe(self, num_decodes: int, prompts: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step has run; ``prompts`` are its chunks of prompts: (position, tokens)."""
        count = depth = 0.0
        for position, tokens in prompts:
            count, depth = count + tokens, depth + self._seen(position, tokens) / _DEEP
        if not count:
            # an old estimate may be of other streams
            self.decode = _mixed(self.decode if self._age < _FRESH else None, seconds)
            self._age = 0
        elif not num_decodes:
            self._learn(count, depth, seconds)
        else:
            self._age += 1
            if self.decode is not None:
                self._learn(count, depth, max(0.0, seconds - self.decode))

    def _learn(self, count: float, depth: float, seconds: float) -> None:
        """Move both estimates, in the direction in which this step tells something of them."""
        rate = 1.0 - _KEPT if self._token or self._depth else 1.0
        step = rate * (seconds - self._token * count - self._depth * depth) / (count**2 + depth**2)
        self._token = max(0.0, self._token + step * count)
        self._depth = max(0.0, self._depth + step * depth)

    def cost(self, position: int, count: int = 1) -> float:
        """Seconds that ``count`` prompt tokens from ``position`` on will take; 0 before any were seen."""
        return count * self._token + self._depth * self._seen(position, count) / _DEEP

    def _seen(self, position: int, count: int) -> float:
        """Tokens that ``count`` tokens from ``position`` on see, added up."""
        if self._most is None:
            return count * (position + count / 2)
        growing = min(count, max(0, self._most - position))
        return growing * (position + growing / 2) + (count - growing) * self._most

    def seconds(self, *, decodes: bool, several: bool = False) -> float | None:
        """What prompts may take of the next step, asked once a step; None where that is not known.

        Args:
            decodes: the step decodes too. Then 0 where it is time to see what decoding alone takes.
            several: more than one prompt is being read.
        """
        if not decodes:
            return SEVERAL if several else LONGEST
        if self._age >= _FRESH or (self.decode is None and self.cost(0) > 0.0):
            return 0.0
        return None if self.decode is None else SHARE * self.decode

    def fitting(self, position: int, seconds: float) -> int | None:
        """Tokens from ``position`` on that take at most ``seconds``, in whole ``ROWS``; None where nothing is known."""
        each = self.cost(position)
        if each <= 0.0:
            return None
        count = int(seconds / each)
        return count - count % ROWS

    def afford(self, price: float, left: float) -> bool:
        """A chunk that takes longer than the ``left`` seconds of a step may be taken, for what was saved up."""
        if price > left + self._saved:
            return False
        self._saved += left - price
        return True

    def save(self, seconds: float) -> None:
        """A chunk had to wait; ``seconds`` of this step count for it."""
        self._saved += seconds


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else _KEPT * old + (1.0 - _KEPT) * new
