"""The processes that try grammars out (``sandbox.py``): a few at a time, each with limits of its own.

Time is the process's own CPU time, and memory its own, so a grammar's verdict does not depend on what else runs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

from pacellm.errors import EngineError, Overloaded
from pacellm.text import sandbox

_WALKS = 3
_START_SECONDS = 60.0
_PATIENCE = 120.0  # seconds by the wall; a process that has had so little time by then tells nothing of the grammar
_BUSY = "grammars take too long to check at the moment; try again later"
_OTHERS_DOING = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}


class GrammarVerdict(NamedTuple):
    """What is wrong with a grammar, None where nothing is, and what it took to know: CPU seconds, and bytes."""

    error: str | None
    seconds: float
    bytes: int = 0


class Vocabulary(NamedTuple):
    """Bytes of every token; ids of those that are no text, and of those that end an answer."""

    tokens: list[bytes]
    special: list[int]
    eos: list[int]


class _Ended(Exception):
    """A process ended, or never answered: its exit status, None where it still ran."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Sandboxes:
    """Processes that try grammars out; any thread may ask.

    Args:
        vocabulary: the model's.
        most: how many processes there may be; they are started when they are needed.
    """

    def __init__(self, vocabulary: Vocabulary, most: int) -> None:
        self._vocabulary = vocabulary
        self._places, self._lock = threading.BoundedSemaphore(most), threading.Lock()
        self._idle: list[_Sandbox] = []
        self._all: set[_Sandbox] = set()
        self._is_closed = False

    def ask(self, grammar: str, seconds: float) -> GrammarVerdict:
        """Try a grammar out in at most ``seconds`` of CPU time.

        Raises:
            Overloaded: the machine is too busy to tell. EngineError: the processes do not work.
        """
        with self._places:
            for is_new in (False, True):
                verdict = self._ask(grammar, seconds, is_new)
                if verdict is not None:
                    return verdict
        raise EngineError("the process that checks grammars was ended by something else; try again")

    def close(self) -> None:
        """End them all."""
        with self._lock:
            self._is_closed = True
            ended, self._all, self._idle = list(self._all), set(), []
        for one in ended:
            one.kill()

    def _ask(self, grammar: str, seconds: float, is_new: bool) -> GrammarVerdict | None:
        """None where the process was ended by something else than the grammar alone."""
        one = self._take(is_new)
        is_new, one.is_new = one.is_new, False
        try:
            answer = one.ask({"grammar": grammar, "walks": _WALKS, "seconds": seconds}, _PATIENCE)
        except _Ended as error:
            self._drop(one)
            if error.status is None:
                raise Overloaded(_BUSY) from None
            if error.status == -signal.SIGPROF:
                return GrammarVerdict(f"too complex: it takes more than {seconds:g} s of processor time", seconds)
            if error.status in _OTHERS_DOING or not is_new:
                return None  # earlier grammars may have left less memory
            return GrammarVerdict(f"too complex: it takes more than {sandbox.MEMORY // 2**20} MiB of memory", seconds)
        except BaseException:
            self._drop(one)
            raise
        with self._lock:
            self._idle.append(one)
        return GrammarVerdict(answer["error"], answer["seconds"], answer["bytes"])

    def _take(self, is_new: bool) -> _Sandbox:
        with self._lock:
            if self._is_closed:
                raise EngineError("the server is shutting down")
            if self._idle and not is_new:
                return self._idle.pop()
        one = _Sandbox()
        with self._lock:
            self._all.add(one)
        try:
            one.begin(self._vocabulary)
        except _Ended as error:
            self._drop(one)
            if error.status is None:
                raise Overloaded(_BUSY) from None
            raise EngineError(f"the process that checks grammars does not start: {error}") from None
        except BaseException:
            self._drop(one)
            raise
        return one

    def _drop(self, one: _Sandbox) -> None:
        with self._lock:
            self._all.discard(one)
        one.kill()


class _Sandbox:
    """One process.

    Attributes:
        is_new: it has tried no grammar out.
    """

    def __init__(self) -> None:
        self.is_new = True
        self.process = subprocess.Popen(
            [sys.executable, "-P", sandbox.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        self._poll = select.poll()
        self._poll.register(self.process.stdout, select.POLLIN)

    def begin(self, vocabulary: Vocabulary) -> None:
        """Give it the vocabulary, and wait until it is ready."""
        tokens = [base64.b64encode(text).decode() for text in vocabulary.tokens]
        self.ask({"tokens": tokens, "special": vocabulary.special, "eos": vocabulary.eos}, _START_SECONDS)

    def ask(self, question: dict[str, Any], patience: float) -> dict[str, Any]:
        """Its answer.

        Raises:
            _Ended: there is none.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        until = time.monotonic() + patience
        while not self._poll.poll(max(0.0, 1e3 * (until - time.monotonic()))):
            if time.monotonic() >= until:
                raise _Ended(None)
        line = self.process.stdout.readline()
        if not line:
            raise _Ended(self.process.wait())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
