"""Where a scenario's server comes from: a running one, or one on the bundled model that the scenario owns."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

_START_LIMIT = 120.0
OWN_KEY = "load-tests"  # sessions are listed only where there are keys


class OwnServer:
    """``pacellm serve`` on a port of its own, that can be killed and started again.

    Args:
        flags: of ``pacellm serve``.
        variables: of its environment, beside those of this process.
    """

    def __init__(self, flags: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self._flags = f"http://127.0.0.1:{self.port}", list(flags)
        self._variables = {**os.environ, **(variables or {})}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; the seconds until it is ready.

        Raises:
            SystemExit: it ended, or did not become ready; with its log.
        """
        started = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pacellm.cli",
            "serve",
            "--port",
            str(self.port),
            "--log-level",
            "warning",
        ]
        command += ["--api-key", OWN_KEY, *self._flags]
        self.process = subprocess.Popen(command, stderr=self._log, env=self._variables)
        while time.monotonic() < started + _START_LIMIT and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return time.monotonic() - started
            time.sleep(0.05)
        raise SystemExit(f"the server did not start:\n{self.log()}")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def close(self) -> None:
        """Forget what it wrote."""
        self._log.close()

    def log(self) -> str:
        """What it wrote."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def handles(self) -> int | None:
        """Open file descriptors, None where the system does not tell."""
        assert self.process is not None
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.is_dir() else None

    def memory(self) -> int:
        """Bytes of resident memory now."""
        return self._status("VmRSS")

    def peak_memory(self) -> int:
        """The most since :meth:`forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        """Let the peak be what is used now."""
        assert self.process is not None
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"this system does not tell {name}")


@contextmanager
def own_server(flags: Sequence[str]) -> Iterator[OwnServer]:
    """A server that ends with the block."""
    server = OwnServer(flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        server.close()


@contextmanager
def given_or_own(args: argparse.Namespace, flags: Sequence[str]) -> Iterator[tuple[str, OwnServer | None]]:
    """The address of the server that ``--url`` names, or of one started with ``flags`` (its key: ``args.api_key``)."""
    if args.url:
        yield args.url, None
        return
    args.api_key = OWN_KEY
    with own_server(flags) as server:
        yield server.url, server


def parser(text: str, *, takes_url: bool = True) -> argparse.ArgumentParser:
    """The flags that all scenarios have."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--small", action="store_true", help="a version of seconds")
    if takes_url:
        found.add_argument("--url", help="of a running server (default: start one on the bundled model)")
        found.add_argument("--api-key", help="of that server; its sessions are erased at the end")
    return found


def report(scenario: str, facts: dict[str, Any], failures: Sequence[str]) -> int:
    """Print the failures and the JSON line; the exit status."""
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    print(
        json.dumps(
            {
                "scenario": scenario,
                "ok": not failures,
                "num_failures": len(failures),
                "failures": list(failures)[:20],
                **facts,
            }
        )
    )
    return 1 if failures else 0
