"""What happens to a server beside its clients: kills, a full disk, and a watch over what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from load_tests.scenarios.servers import OwnServer
from load_tests.scenarios.twins import PATIENCE, Tally


async def kill_often(server: OwnServer, every: float, until: float, tally: Tally, rng: random.Random) -> None:
    """kill -9 and start again."""
    while True:
        pause = every * (0.3 + 1.4 * rng.random())
        if time.monotonic() + pause > until:
            return
        await asyncio.sleep(pause)
        server.kill()
        tally.kills += 1
        await asyncio.to_thread(server.start)


async def fill_disk(directory: Path, until: float, rng: random.Random) -> None:
    """Somebody else's file takes what is left of the file system, and goes again."""
    filler = directory / "of-somebody-else"
    try:
        while time.monotonic() < until:
            await asyncio.sleep(1 + 4 * rng.random())
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            await asyncio.sleep(1 + 4 * rng.random())
            filler.unlink()
    finally:
        filler.unlink(missing_ok=True)


async def watch(server: OwnServer, key: str, every: float, samples: list[dict[str, int]], tally: Tally) -> None:
    """What the server holds, every so many seconds."""
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE) as client:
        while True:
            scrape = (await client.get("/metrics")).text
            series = sum(len(family.samples) for family in text_string_to_metric_families(scrape))
            assert server.process is not None
            tasks = Path(f"/proc/{server.process.pid}/task")
            samples.append({
                "requests": sum(tally.operations.values()), "mib": server.memory() // 2**20,
                "descriptors": server.handles() or 0, "threads": len(list(tasks.iterdir())), "series": series,
            })  # fmt: skip
            await asyncio.sleep(every)


def grown(samples: list[dict[str, int]]) -> list[str]:
    """What was larger at the end than in the second quarter: (the first is warming up)."""
    quarter = len(samples) // 4
    if not quarter:
        return ["too few samples of memory: a longer run is needed"]
    found = []
    for name, slack in (("mib", 0.03), ("descriptors", 0.25), ("threads", 0.0), ("series", 0.02)):
        early, late = (max(one[name] for one in part) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
        if late > early * (1 + slack) + 1:
            found.append(f"{name} grew from {early} to {late}")
    return found


@contextlib.contextmanager
def small_disk(bytes_: int) -> Iterator[Path]:
    """A file system of its own.

    Raises:
        SystemExit: this user may not mount one.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", folder], capture_output=True, check=False
        )
        if made.returncode:
            raise SystemExit(f"the phase disk mounts a file system: {made.stderr.decode()}; leave it out with --phases")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)
