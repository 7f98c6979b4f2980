"""How a session's history ends: the log says which ids were fed, and not whether the last of them belong to it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import get_args

from pacellm.types import End

_ENDS: tuple[End, ...] = get_args(End)


@dataclass(frozen=True)
class Ending:
    """How a session's history ends.

    Attributes:
        end: with what.
        kept: tokens of the context that belong to it.
        rest: ids that belong to it behind those: a token that was sampled and never fed.
        tools: digest of the tools that it shows, 0 for none.
    """

    end: End
    kept: int
    rest: tuple[int, ...] = ()
    tools: int = 0

    def to_json(self) -> str:
        """For a file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, vocab_size: int) -> Ending:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: it did not.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or found.keys() != {"end", "kept", "rest", "tools"}:
            raise ValueError("no ending")
        numbers = [found["kept"], found["tools"], *found["rest"]]
        if found["end"] not in _ENDS or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("no ending")
        if any(token >= vocab_size for token in found["rest"]):
            raise ValueError("ids outside the vocabulary")
        return cls(found["end"], found["kept"], tuple(found["rest"]), found["tools"])
