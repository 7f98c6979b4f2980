"""How many tokens a text has, by the server's own tokenizer where it tells."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import httpx

from pacellm.errors import PaceError

CHARACTERS = 4
"""Of a token, about, where a server does not count."""
_PIECE = 200_000
"""Characters counted at a time: servers limit a request, and beginnings that prompts share are counted once."""
_TEMPLATE = 64
"""Tokens allowed for a chat template that is not counted."""


class Tokens:
    """Counts tokens.

    Args:
        http: a client at the server's root.
        model: the name to ask for.
    """

    def __init__(self, http: httpx.Client, model: str) -> None:
        self._http, self._model = http, model
        self._ask = next((ask for ask in (self._ours, self._llama_cpp) if ask("a test") is not None), None)
        self._count = lru_cache(4096)(self._count_piece)

    @property
    def is_exact(self) -> bool:
        """The server counts."""
        return self._ask is not None

    def count(self, text: str) -> int:
        """Of a text; a long one is counted in pieces, to within a token each.

        Raises:
            PaceError: a server that counted does no more.
        """
        pieces, start = [], 0
        while start < len(text):
            end = start + _PIECE
            if end < len(text):
                end = max(text.rfind(" ", start + 1, end), start + _PIECE // 2)
            pieces.append(text[start:end])
            start = end
        return sum(map(self._count, pieces))

    def template(self) -> int:
        """What the chat template puts around one message."""
        body = {"model": self._model, "messages": [{"role": "user", "content": "a test"}]}
        found = self._post(body) if self._ask == self._ours else None
        return _TEMPLATE if found is None else max(0, found - self.count("a test"))

    def most(self, take: Callable[[int], str], limit: int, guess: int) -> int:
        """The largest n, to within a percent, with at most ``limit`` tokens in ``take(n)``; 0 where none fits.

        Args:
            take: a text that grows about evenly with n.
            guess: where to begin, at least 1.
        """
        best, n = 0, max(1, guess)
        for _ in range(8):
            found = self.count(take(n))
            if found <= limit:
                best = max(best, n)
                if found >= 0.99 * limit:
                    break
            closer = int(n * limit / max(found, 1) * (1.0 if found <= limit else 0.998))
            if closer in (n, best) or closer < 1:
                break
            n = closer
        return best

    def _count_piece(self, text: str) -> int:
        if self._ask is None:
            return -(-len(text) // CHARACTERS)
        for pause in (0.0, 1.0, 5.0, 20.0):
            time.sleep(pause)
            if (found := self._ask(text)) is not None:
                return found
        raise PaceError("the server counts tokens no more (/tokenize); run the command again to go on")

    def _ours(self, text: str) -> int | None:
        """As PaceLLM and vLLM count."""
        return self._post({"model": self._model, "prompt": text, "add_special_tokens": False})

    def _llama_cpp(self, text: str) -> int | None:
        return self._post({"content": text})

    def _post(self, body: dict[str, Any]) -> int | None:
        """The number; None from a server that does not count so."""
        try:
            response = self._http.post("/tokenize", json=body)
            found = response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None
        tokens = found.get("tokens") if isinstance(found, dict) else None
        return len(tokens) if isinstance(tokens, list) else None
