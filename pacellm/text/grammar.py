"""Constrained decoding: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

A matcher belongs to one sequence and is a function of the tokens it has generated, so neither batch mates nor a
preemption can change what it allows.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.text import sandbox
from pacellm.text.constraints import Grammar, after_space
from pacellm.text.sandboxes import GrammarVerdict, Sandboxes, Vocabulary

MAX_BYTES = 2**18
PROCESSES = min(4, max(2, os.cpu_count() or 2))
"""Grammars that are tried out at once."""

_SECONDS = 3.0  # of CPU time, to compile one grammar and to try it out
_BLAME = 2  # times that, to find the part of a grammar that is wrong
_KEPT_BYTES = 256 * 2**20  # of grammars whose verdict is kept
_PER_CHARACTER = 64  # bytes that a grammar takes at least, for each of its text
_WITHIN = "\x02"  # no tokenizer joins it to what follows


class Matcher:
    """Where one sequence is in its grammar.

    Args:
        matcher: at its beginning; this object's own.
        param: the request's field to name in errors.
    """

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher, self._param = matcher, param
        self._num_fed = 0

    def allowed(self, generated: list[int], size: int) -> np.ndarray:
        """[size] bool: the tokens that may follow what was generated.

        Raises:
            RequestError: nothing may, or the grammar takes too long here.
        """
        self._feed(generated)
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = np.unpackbits(mask, bitorder="little")[:size].astype(bool)
        if not bits.any():
            raise RequestError("the grammar allows no token here", param=self._param)
        return np.pad(bits, (0, size - len(bits)))

    def is_complete(self, generated: list[int]) -> bool:
        """Nothing may follow what was generated.

        Raises:
            RequestError: it is not what the grammar describes.
        """
        self._feed(generated)
        return self._matcher.is_stopped()

    def _feed(self, generated: list[int]) -> None:
        if len(generated) < self._num_fed:
            self._matcher.reset()
            self._num_fed = 0
        new = generated[self._num_fed :]
        if new:
            self._matcher.consume_tokens(new)
            self._num_fed = len(generated)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar failed: {_short(self._matcher.get_error())}", param=self._param)


class Compiled:
    """A grammar that was found good; every sequence takes a matcher of its own."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher, self._param = matcher, param

    def new_matcher(self) -> Matcher:
        """At the grammar's beginning."""
        return Matcher(self._matcher.deep_copy(), self._param)


_Key = tuple[str, tuple[str, ...]]


class _Kept:
    """Verdicts on grammars by text and fields, the least recently asked first out.

    Args:
        max_bytes: that they may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max, self._bytes, self._lock = max_bytes, 0, threading.Lock()
        self._found: OrderedDict[_Key, tuple[Compiled | RequestError, int]] = OrderedDict()

    def get(self, key: _Key) -> Compiled | None:
        """A good one, or None where it is not known.

        Raises:
            RequestError: a bad one.
        """
        with self._lock:
            found, _ = self._found.get(key, (None, 0))
            if found is not None:
                self._found.move_to_end(key)
        if isinstance(found, RequestError):
            raise RequestError(found.message, param=found.param, code=found.code)
        return found

    def put(self, key: _Key, found: Compiled | RequestError, size: int) -> None:
        """Keep a verdict that takes ``size`` bytes, in place of others where it must."""
        with self._lock:
            _, before = self._found.pop(key, (None, 0))
            self._found[key] = found, size
            self._bytes += size - before
            while self._bytes > self._max:
                _, (_, size) = self._found.popitem(last=False)
                self._bytes -= size


class Grammars:
    """Compiles grammars for one model, and keeps what it found. Any thread may; it takes milliseconds, or seconds where
    a grammar is refused.

    Args:
        tokenizer: the fast tokenizer's backend.
        eos_token_ids: the model's end tokens.
        seconds: CPU time to try out a grammar.
        processes: that try grammars out at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        seconds: float = _SECONDS,
        processes: int = PROCESSES,
    ) -> None:
        self._backend, self._eos, self._seconds = tokenizer, sorted(eos_token_ids), seconds
        self._most = processes
        self._loading, self._kept = threading.RLock(), _Kept(_KEPT_BYTES)
        self._tokenizer: LLTokenizer | None = None
        self._tokens: list[bytes] = []
        self._special: list[int] = []
        self._takes_space = False
        self._sandboxes: Sandboxes | None = None

    def known(self, grammar: Grammar) -> Compiled | None:
        """What :meth:`compile` found of this grammar before, None where that is not known. Never slow.

        Raises:
            RequestError: as it did then.
        """
        if self._tokenizer is None:
            return None
        return self._kept.get(self._key(grammar))

    def compile(self, grammar: Grammar) -> Compiled:
        """A grammar that is known to compile and to run.

        Raises:
            RequestError: it is wrong, or takes too much; names the field.
            UnsupportedParameter: this model's tokenizer has no bytes to constrain.
            Overloaded: the machine is too busy to tell.
        """
        tokenizer = self._load()
        key = text, _ = self._key(grammar)
        if len(text) > MAX_BYTES:
            raise RequestError(
                f"{grammar.start.param} is too large: {len(text):,} bytes, at most {MAX_BYTES:,}",
                param=grammar.start.param, code="invalid_value",
            )  # fmt: skip
        found = self._kept.get(key)
        if found is None:
            verdict, size = self._try(text), _PER_CHARACTER * len(text)
            if verdict.error is not None:
                refusal = self._refusal(grammar, verdict.error)
                self._kept.put(key, refusal, size)
                raise refusal
            found = Compiled(sandbox.new_matcher(tokenizer, text), grammar.start.param)
            self._kept.put(key, found, size + verdict.bytes)
        return found

    def special(self, text: str) -> int | None:
        """The token that a text is, where no other text leads to it."""
        token = self._backend.token_to_id(text)
        return token if token is not None and self._load().is_special_token(token) else None

    def close(self) -> None:
        """End the processes that try grammars out."""
        with self._loading:
            if self._sandboxes is not None:
                self._sandboxes.close()

    def _key(self, grammar: Grammar) -> _Key:
        text = (after_space(grammar) if self._takes_space else grammar).text()
        return text, tuple(part.param for part in grammar.parts)

    def _refusal(self, grammar: Grammar, error: str) -> RequestError:
        """The error of the part that is to blame."""
        param, left = grammar.start.param, _BLAME * self._seconds
        for part in grammar.parts if len(grammar.parts) > 1 else ():
            if left <= 0.0:
                break
            if part.schema is not None or "@" not in (part.lark or ""):
                own = self._try(Grammar((part,)).text())
                left -= own.seconds
                if own.error is not None:
                    param, error = part.param, own.error
                    break
        return RequestError(f"{param}: {_short(error)}", param=param, code="invalid_value")

    def _try(self, text: str) -> GrammarVerdict:
        self._load()
        assert self._sandboxes is not None
        return self._sandboxes.ask(text, self._seconds)

    def _load(self) -> LLTokenizer:
        """The vocabulary, when first needed: seconds for a large one."""
        with self._loading:
            if self._tokenizer is None:
                self._read_vocabulary()
                self._sandboxes = Sandboxes(Vocabulary(self._tokens, self._special, self._eos), self._most)
                self._tokenizer = sandbox.build(self._tokens, self._special, self._eos, self._encode)
            return self._tokenizer

    def _read_vocabulary(self) -> None:
        if not self._eos:
            raise UnsupportedParameter("this model has no end token, so its answers cannot be constrained")
        try:
            raw = LLTokenizer(self._backend.to_str(), eos_token=self._eos)
        except ValueError as error:
            raise UnsupportedParameter(f"this model's tokenizer cannot be constrained: {error}") from error
        ids = range(raw.vocab_size)
        self._tokens = [raw.decode_bytes([token]) for token in ids]
        self._special = [token for token in ids if raw.is_special_token(token)]
        self._takes_space = self._decodes_without_space()

    def _encode(self, data: bytes) -> list[int] | None:
        """Tokens of a text within an answer, as the model would write it; what a grammar forces is written so."""
        try:
            ids = self._backend.encode(_WITHIN + data.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            return None
        before = b""
        for number, token in enumerate(ids):
            if before.endswith(_WITHIN.encode()):
                rest = ids[number:]
                is_whole = b"".join(self._tokens[token] for token in rest) == data
                return rest if is_whole and not set(rest) & set(self._special) else None
            before += self._tokens[token]
        return None

    def _decodes_without_space(self) -> bool:
        """Whether a text's first token loses its space when it is decoded."""
        hidden = set(self._special)
        for token, text in enumerate(self._tokens):
            if token not in hidden and len(text) > 1 and text[:1] == b" " and text[1:].isalpha():
                return self._backend.decode([token]) == text[1:].decode()
        return False


def _short(error: str) -> str:
    """A message's first line; of a wrong pattern also which it is, and why."""
    lines = [line.strip() for line in (error.strip() or "not valid").splitlines()]
    if lines[0].startswith("oneOf constraints are not supported"):
        return "oneOf cannot be enforced where more than one of its schemas might apply; anyOf can"
    if lines[0] == "regex parse error:" and len(lines) > 1:
        why = next((line for line in lines if line.startswith("error:")), "")
        return f"{lines[0]} {lines[1]} {why}"[:300]
    return lines[0][:300]
