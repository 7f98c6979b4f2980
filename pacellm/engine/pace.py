"""How many prompt tokens a step may take, by what they have cost of late.

A prompt token's cost grows with its position: behind 200,000 tokens it is many times that behind 1,000. So a step's
budget is one of time. Cuts change no answer, so the clock may decide them.
"""

from __future__ import annotations

from pacellm.rows import ROWS

SHARE = 1.75  # prompt parts of a step may take this many times what its decoding takes
LONGEST = 2.0  # seconds of a step that decodes nothing: who arrives meanwhile waits for its end
SEVERAL = 0.5  # seconds of such a step with several prompts: the shortest waits for its first token
_KEPT = 0.6  # of an estimate, at each observation
_FRESH = 64  # steps after which the next one only decodes, to see what that takes by now


class Pace:
    """Running estimates of what steps cost, in seconds."""

    def __init__(self) -> None:
        self.decode: float | None = None  # a step that only decodes
        self.token: float | None = None  # a prompt token
        self._saved = 0.0  # seconds that prompts have coming
        self._age = 0  # steps that decoded beside prompts since one only decoded

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step has run."""
        if not num_prompt_tokens:
            # an old estimate may be of other streams
            self.decode = _mixed(self.decode if self._age < _FRESH else None, seconds)
            self._age = 0
        elif not num_decodes:
            self.token = _mixed(self.token, seconds / num_prompt_tokens)
        else:
            self._age += 1
            if self.decode is not None:
                self.token = _mixed(self.token, max(0.0, seconds - self.decode) / num_prompt_tokens)

    def budget(self, limit: int, *, decodes: bool, several: bool = False) -> int:
        """Prompt tokens of the next step, asked once a step: at most ``limit``, as many as there is time for, in whole
        ``ROWS``; ``several`` prompts may be in work. Where even ``ROWS`` take longer than that, as deep in a prompt,
        steps that only decode go before until the time they leave to prompts is enough. None either where it is time
        to see what decoding takes."""
        if decodes and (self._age >= _FRESH or (self.decode is None and self.token is not None)):
            return 0
        undecoded = SEVERAL if several else LONGEST
        seconds = undecoded if not decodes else None if self.decode is None else SHARE * self.decode
        if not self.token or seconds is None:
            return limit
        if decodes:
            smallest = ROWS * self.token
            if seconds + self._saved < smallest:
                self._saved += seconds
                return 0
            seconds, self._saved = max(seconds, smallest), 0.0
        fitting = int(seconds / self.token)
        return min(limit, max(ROWS, fitting - fitting % ROWS))


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else _KEPT * old + (1.0 - _KEPT) * new
