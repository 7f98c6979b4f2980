"""What each decoded token found in the banks, from the counters that banks have anyway: a token adds one to one of
them. So nothing on the device is another for a request that is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pacellm.memory.state import MERGES
from pacellm.types import BankTrace

MAX_TOKENS = 2048
_LETTERS = "hfme"  # in the order of ``COUNTERS``


class TokenTrace:
    """The outcomes of one answer's first ``MAX_TOKENS`` tokens, by layer."""

    def __init__(self) -> None:
        self._before: Mapping[int, Sequence[int]] | None = None
        self._letters: dict[int, list[str]] = {}
        self._known = 0

    def fed(self, count: int, counters: Mapping[int, Sequence[int]]) -> None:
        """Tokens were fed. A sequence that starts again feeds what is known already, which is passed over.

        Args:
            count: tokens of the answer that are fed by now.
            counters: the row's by layer, in the order of ``COUNTERS``.
        """
        if count == self._known + 1 and count <= MAX_TOKENS and self._before is not None:
            for layer, now in counters.items():
                done = [after - before for after, before in zip(now, self._before[layer], strict=True)]
                self._letters.setdefault(layer, []).append(_LETTERS[done.index(1, 0, MERGES)])
            self._known = count
        if count == self._known:
            self._before = counters

    def told(self, generated: Sequence[int]) -> BankTrace:
        """Of an answer that has ended. Its last token was never fed."""
        layers = {layer: "".join(letters) for layer, letters in self._letters.items()}
        return BankTrace(tuple(generated[:MAX_TOKENS]), layers, max(0, len(generated) - MAX_TOKENS))
