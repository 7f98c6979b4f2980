"""A server on the bundled model as a process of its own, and documents for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import pacellm
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import Document, make_document
from pacellm.errors import PaceError
from pacellm.text.tokenizer import ChatTokenizer

_STILL_SECONDS = 120.0  # without a line of log or CPU time, after which a server that starts is given up


def sample_document(num_tokens: int, seed: int) -> Document:
    """A document of about ``num_tokens`` tokens, with a fact for every 500 up to 200."""
    facts = max(2, min(200, num_tokens // 500))
    return make_document(num_tokens=num_tokens, num_facts=facts, seed=seed, tokenizer=ChatTokenizer(MODEL_PATH))


@contextmanager
def running_server(serve_arguments: Sequence[str] = ()) -> Iterator[httpx.Client]:
    """``pacellm serve`` on a free port, and a client of it; the server ends with the context.

    Raises:
        PaceError: it did not become ready; carries its log.
    """
    port = _free_port()
    # with -P no file in the working directory takes a module's place
    command = [sys.executable, "-P", "-m", "pacellm.cli", "serve", "--port", str(port), "--log-level", "warning"]
    # a server's log never blocks on a pipe nobody reads
    with (
        _ending_with_sigterm(),
        tempfile.TemporaryFile() as log,
        subprocess.Popen([*command, *serve_arguments], stderr=log, env=_environment()) as server,
    ):
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=httpx.Timeout(None, connect=10)) as client:
                _wait_until_ready(client, server, log)
                yield client
        finally:
            server.terminate()
            server.wait()


@contextmanager
def _ending_with_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: what it has started ends with it. In the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment() -> dict[str, str]:
    """Where this package was found in a checkout that is the working directory, so will it be by the server."""
    root = Path(pacellm.__file__).parent.parent
    paths = [str(root)] if root == Path.cwd() else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)} if paths else dict(os.environ)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes], log: Any) -> None:
    """However long it takes, as long as something goes on."""
    before, since = _signs_of_life(server, log), time.monotonic()
    while time.monotonic() - since < _STILL_SECONDS:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        try:
            server.wait(0.2)
        except subprocess.TimeoutExpired:
            if (now := _signs_of_life(server, log)) != before:
                before, since = now, time.monotonic()
            continue
        break
    log.seek(0)
    raise PaceError(f"the server did not start:\n{log.read().decode()}")


def _signs_of_life(server: subprocess.Popen[bytes], log: Any) -> tuple[int, list[str]]:
    """What changes as long as a server does something: its log's size and its CPU time."""
    try:
        ticks = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:  # not Linux, or it has just ended
        ticks = []
    return os.fstat(log.fileno()).st_size, ticks
