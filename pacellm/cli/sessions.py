"""``pacellm sessions``: what a server keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from pacellm.cli.connection import connected, send

_HEAD = ("SESSION", "TOKENS", "TIER", "BYTES", "USED")
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def run(action: str, url: str, key: str | None, names: Sequence[str]) -> int:
    """``ls``, ``show`` or ``rm``.

    Raises:
        PaceError: no server, or it refuses.
    """
    with connected(url, key) as http:
        if action == "ls":
            print("\n".join(table(listed(http))))
        for name in names:
            response = send(http, "GET" if action == "show" else "DELETE", f"/v1/sessions/{quote(name, safe='')}")
            print(json.dumps(response.json(), indent=2) if action == "show" else f"{name}: deleted")
    return 0


def listed(http: httpx.Client) -> Iterator[dict[str, Any]]:
    """The key's sessions, most recently used first.

    Raises:
        PaceError: the server does not list them.
    """
    after = ""
    while True:
        page = send(http, "GET", f"/v1/sessions{after}").json()
        yield from page["data"]
        if not page["has_more"]:
            return
        after = f"?after={quote(page['last_id'], safe='')}"


def table(sessions: Iterator[dict[str, Any]]) -> Iterator[str]:
    """A head and a line for each, in columns."""
    now = time.time()
    rows = [_HEAD, *(_row(one, now) for one in sessions)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(one: dict[str, Any], now: float) -> tuple[str, ...]:
    used = "now" if one["in_use"] else _ago(now - one["last_used"])
    return one["id"], f"{one['tokens']:,}", one["tier"], _bytes(sum(one["bytes"].values())), used


def _bytes(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:.1f} GiB"


def _ago(seconds: float) -> str:
    size, name = next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])
    return f"{max(0, seconds) // size:.0f} {name} ago"
