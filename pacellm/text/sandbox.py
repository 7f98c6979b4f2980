"""Tries grammars out in a process of its own, which may be killed: some cannot be compiled in any time or memory.

Run as a script, so that it imports nothing but llguidance. Lines of JSON on stdin and stdout: first the vocabulary, of
which ``{}`` says that it is there; then ``{"grammar", "walks", "seconds"}`` and ``{"error", "seconds", "bytes"}``, in
turn. The error is null where the grammar compiles and the steps of random walks through it are quick; seconds of CPU
time and bytes are what it took. A grammar that takes more seconds ends the process by SIGPROF, and one that takes more
than ``MEMORY`` by a failed allocation, whatever it is in the middle of.
"""

from __future__ import annotations

import base64
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

STEP_SECONDS = 0.2
_STEPS = 48
MEMORY = 512 * 2**20
"""Bytes that a grammar may take beside the vocabulary."""

_WHOLE = 2 * 2**30  # bytes of the process, where it does not know what it takes
_NICE = 5  # the engine goes first

# the limits of every matcher, here and in the engine
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 200_000,  # a text that is counted takes 4 to 8 for each character
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


Encode = Callable[[bytes], list[int] | None]


class GuidanceVocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token, and some way to write a text in them.

    Args:
        tokens: bytes by id; empty where no text leads to the token.
        special: ids of tokens that are no text.
        encode: the model's own way to write a text, None where it has none; without it the longest token goes first.
    """

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: list[int], encode: Encode | None = None) -> None:
        self._encode = encode
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, eos[0]
        hidden = set(special)
        self._ids = {text: token for token, text in enumerate(tokens) if text and token not in hidden}
        self._longest = max((len(text) for text in self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """Bytes that no token has are left out."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        own = None if self._encode is None else self._encode(data)
        return self._longest_first(data) if own is None else own

    def _longest_first(self, data: bytes) -> list[int]:
        found, place = [], 0
        while place < len(data):
            for length in range(min(self._longest, len(data) - place), 0, -1):
                token = self._ids.get(data[place : place + length])
                if token is not None:
                    found.append(token)
                    break
            else:
                length = 1
            place += length
        return found


def build(tokens: list[bytes], special: list[int], eos: list[int], encode: Encode | None = None) -> LLTokenizer:
    """A tokenizer of llguidance from its vocabulary."""
    return LLTokenizer(TokenizerWrapper(GuidanceVocabulary(tokens, special, eos, encode)), eos_token=eos)


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher within the limits; errors are in it."""
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))


def error_of(tokenizer: LLTokenizer, grammar: str, walks: int) -> str | None:
    """What is wrong with a grammar."""
    first = new_matcher(tokenizer, grammar)
    for number in range(walks):
        matcher, rng = first.deep_copy(), random.Random(number)
        for _ in range(_STEPS):
            started = time.thread_time()
            mask = b"" if matcher.is_error() else matcher.compute_bitmask()
            if matcher.is_error():
                return matcher.get_error()
            allowed = int.from_bytes(mask, "little")
            if not allowed:
                return "nothing can follow"
            matcher.consume_token(_random_bit(allowed, rng))
            if time.thread_time() - started > STEP_SECONDS:
                return f"too complex: a token takes more than {STEP_SECONDS} s"
            if matcher.is_stopped():
                break
        if matcher.is_error():
            return matcher.get_error()
    return None


def _random_bit(mask: int, rng: random.Random) -> int:
    """The number of one of the bits that are set: the first from a random place on."""
    size = mask.bit_length()
    place = rng.randrange(size)
    rest = mask >> place or mask
    offset = place if mask >> place else 0
    return offset + (rest & -rest).bit_length() - 1


def main() -> None:
    """Answer until stdin ends."""
    os.nice(_NICE)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary: dict[str, Any] = json.loads(sys.stdin.readline())
    tokens = [base64.b64decode(text) for text in vocabulary["tokens"]]
    tokenizer = build(tokens, vocabulary["special"], vocabulary["eos"])
    size, _ = _used()
    limit = size + MEMORY if size else _WHOLE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started, before = time.process_time(), _used()[1]
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        error, used = error_of(tokenizer, asked["grammar"], asked["walks"]), _used()[1]
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - started
        print(json.dumps({"error": error, "seconds": seconds, "bytes": max(0, used - before)}), flush=True)


def _used() -> tuple[int, int]:
    """Bytes of this process's address space and of those in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            size, resident, *_ = (int(pages) * resource.getpagesize() for pages in file.read().split())
    except OSError:
        return 0, 0
    return size, resident


if __name__ == "__main__":
    main()
