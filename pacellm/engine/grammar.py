"""Constrained decoding: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

A matcher belongs to one sequence and is a function of the tokens it has generated, so neither batch mates nor a
preemption can change what it allows.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from queue import Empty, Queue

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from pacellm.engine import probe
from pacellm.errors import RequestError, UnsupportedParameter
from pacellm.grammar import Grammar, after_space

MAX_BYTES = 2**18
_SECONDS = 3.0  # to compile one grammar and to try it out
_START_SECONDS = 60.0
_WALKS = 3
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


class Grammars:
    """Compiles grammars for one model. Any thread may; it takes milliseconds, or seconds where it is refused.

    Args:
        tokenizer: the fast tokenizer's backend.
        eos_token_ids: the model's end tokens.
        seconds: to try out a grammar.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], seconds: float = _SECONDS) -> None:
        self._backend, self._eos, self._seconds = tokenizer, sorted(eos_token_ids), seconds
        self._lock, self._loading = threading.Lock(), threading.RLock()
        self._tokenizer: LLTokenizer | None = None
        self._tokens: list[bytes] = []
        self._special: list[int] = []
        self._takes_space = False
        self._probe: _Probe | None = None

    def compile(self, grammar: Grammar) -> Compiled:
        """A grammar that is known to compile and to run.

        Raises:
            RequestError: it is wrong, or takes too much; names the field.
            UnsupportedParameter: this model's tokenizer has no bytes to constrain.
        """
        text = (after_space(grammar) if self._strips_space() else grammar).text()
        if len(text) > MAX_BYTES:
            raise RequestError(
                f"{grammar.start.param} is too large: {len(text):,} bytes, at most {MAX_BYTES:,}",
                param=grammar.start.param, code="invalid_value",
            )  # fmt: skip
        with self._lock:
            error = self._try(text)
            if error is not None:
                raise self._refusal(grammar, error)
        return Compiled(probe.new_matcher(self._load(), text), grammar.start.param)

    def special(self, text: str) -> int | None:
        """The token that a text is, where no other text leads to it."""
        token = self._backend.token_to_id(text)
        return token if token is not None and self._load().is_special_token(token) else None

    def close(self) -> None:
        """End the process that tries grammars out."""
        with self._lock:
            if self._probe is not None:
                self._probe.kill()
                self._probe = None

    def _refusal(self, grammar: Grammar, error: str) -> RequestError:
        """The error of the part that is to blame."""
        param, until = grammar.start.param, time.monotonic() + 2 * self._seconds
        for part in grammar.parts if len(grammar.parts) > 1 else ():
            if time.monotonic() > until:
                break
            if part.schema is not None or "@" not in (part.lark or ""):
                own = self._try(Grammar((part,)).text())
                if own is not None:
                    param, error = part.param, own
                    break
        return RequestError(f"{param}: {_short(error)}", param=param, code="invalid_value")

    def _try(self, text: str) -> str | None:
        if self._probe is None:
            self._load()
            self._probe = _Probe(self._tokens, self._special, self._eos)
        try:
            return self._probe.ask(text, self._seconds)
        except TimeoutError:
            self._probe.kill()
            self._probe = None
            return f"too complex: it does not compile within {self._seconds:g} s"

    def _strips_space(self) -> bool:
        self._load()
        return self._takes_space

    def _load(self) -> LLTokenizer:
        """The vocabulary, when first needed: seconds for a large one."""
        with self._loading:
            if self._tokenizer is None:
                self._read_vocabulary()
                self._tokenizer = probe.build(self._tokens, self._special, self._eos, self._encode)
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


class _Probe:
    """``probe.py`` in its process."""

    def __init__(self, tokens: list[bytes], special: list[int], eos: list[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", probe.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, name="pacellm-grammar", daemon=True).start()
        encoded = [base64.b64encode(text).decode() for text in tokens]
        self._write({"tokens": encoded, "special": special, "eos": eos})
        self.ask('{"grammars":[{"lark_grammar":"start: \\"a\\""}]}', _START_SECONDS)

    def ask(self, grammar: str, seconds: float) -> str | None:
        """What is wrong with a grammar.

        Raises:
            TimeoutError: it takes longer, or more memory than the process may have.
        """
        self._write({"grammar": grammar, "walks": _WALKS})
        try:
            line = self._lines.get(timeout=seconds)
        except Empty:
            raise TimeoutError from None
        if not line:
            raise TimeoutError
        return json.loads(line)["error"]

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin,):
            if stream is not None:
                stream.close()

    def _write(self, what: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise TimeoutError from None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")


def _short(error: str) -> str:
    """A message's first line."""
    return (error.strip() or "not valid").splitlines()[0][:300]
