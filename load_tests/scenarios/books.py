"""The server's books: what its /metrics and /v1/sessions say it holds, before and after."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

_HELD = (
    "pacellm_num_requests_running",
    "pacellm_num_requests_waiting",
    "pacellm_kv_cache_usage_perc",
    "pacellm_session_bytes/device/kv",
    "pacellm_session_bytes/device/bank",
    "pacellm_session_bytes/host/all",
    "pacellm_session_log_bytes",
    "pacellm_sessions",
    "pacellm_progress_entries",
)
_ENOUGH = 60.0  # seconds after which what is still held is left over


@dataclass(frozen=True)
class Books:
    """Every sample of a scrape, named ``family/label values``, and the caller's sessions as listed."""

    samples: dict[str, float]
    sessions: list[dict[str, Any]]

    @property
    def held(self) -> dict[str, float]:
        """What must come back to where it was."""
        return {name: self.samples[name] for name in _HELD if name in self.samples}


def parse(text: str) -> dict[str, float]:
    """Samples of a scrape by name and label values, the model's name left out; histograms left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.type == "histogram":
            continue
        for sample in family.samples:
            labels = [value for label, value in sample.labels.items() if label != "model_name"]
            found["/".join([sample.name, *labels])] = sample.value
    return found


async def read_books(client: httpx.AsyncClient) -> Books:
    """What the server says now."""
    metrics, sessions = await client.get("/metrics"), await client.get("/v1/sessions")
    metrics.raise_for_status()
    sessions.raise_for_status()
    return Books(parse(metrics.text), sessions.json()["data"])


async def open_books(client: httpx.AsyncClient) -> Books:
    """The books before a scenario, which erases its caller's sessions at its end.

    Raises:
        SystemExit: the caller has sessions already.
    """
    before = await read_books(client)
    if before.sessions:
        raise SystemExit(
            f"this key holds {len(before.sessions)} sessions, and a scenario erases its key's sessions at the end: "
            f"give it a key of its own with --api-key"
        )
    return before


async def wait_until_idle(client: httpx.AsyncClient, seconds: float = _ENOUGH) -> Books:
    """The books once nothing runs or waits, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        books = await read_books(client)
        busy = books.held["pacellm_num_requests_running"] + books.held["pacellm_num_requests_waiting"]
        if not busy or time.monotonic() > deadline:
            return books
        await asyncio.sleep(0.1)


async def close_books(client: httpx.AsyncClient, before: Books, *, erase: bool = True) -> list[str]:
    """Erase the caller's sessions and kept progress, and name everything that is still held beyond ``before``."""
    await wait_until_idle(client)
    if erase:
        (await client.delete("/v1/sessions")).raise_for_status()
    deadline = time.monotonic() + _ENOUGH
    while True:
        after = await read_books(client)
        left = [f"left over: {name} {value:g}, before {before.held.get(name, 0.0):g}"
                for name, value in after.held.items() if value > before.held.get(name, 0.0)]  # fmt: skip
        left += [f"left over: session {session['id']}" for session in after.sessions]
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.1)


def grown(before: Books, after: Books, name: str) -> float:
    """How much a counter has grown."""
    return after.samples.get(name, 0.0) - before.samples.get(name, 0.0)
