"""Random histories of a whole server against an undisturbed one: ``python -m load_tests.scenarios.histories``.

Two servers with the same model and flags. One is disturbed: its KV and its pool of banks are small, so that sessions
are spilled, restored and replayed all the time; clients leave in the middle of a request; it is killed (kill -9) and
started again every ``--every`` seconds on average; its disk runs full. The other one has room and peace. ``--workers``
of two keys, whose sessions have the same names, draw operations from a seed: turns that send the whole history or
append, streamed or not, in sessions and without, in every PA mode, with several choices, with log-probabilities,
completions, chains of responses, conversations, forks, resets, deletions, snapshots. Every operation that the
disturbed server has carried out is carried out by the other, and compared: texts, log-probabilities to the bit, reads
of banks, a session's commits, tokens and banks. What was cut off is looked up: either it has happened or it has not.

Phases, each on servers of its own, for equal shares of ``--minutes``: ``tiers``, ``acting`` (``--pa-preset
reference``), ``experts`` (a layout and a density), ``ranks`` (two processes: no tiers, no kills), ``disk`` (a file
system of 24 MB that others fill; needs the right to mount one), and ``steady``: no kills, ``--requests`` requests a
third of which are given up, without comparisons, with memory, descriptors, threads and series of metrics on the way.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from load_tests.scenarios.operations import Failure, Operation, Outcome, draw
from load_tests.scenarios.servers import OwnServer, parser, report

KEYS = ("load-tests", "other-tests")
PHASES = ("tiers", "acting", "experts", "ranks", "disk", "steady")
_NAMES = ("a", "b", "c")
_PATIENCE = 180.0  # seconds that a client tries to reach a server again
_EMPTY = {"commits": 0, "tokens": 0}
_SETTLED = 4.0  # seconds without a change after which a request that was given up has not happened
_CALM = ["--max-num-seqs", "8", "--max-model-len", "4096", "--kv-cache-memory-bytes", "256M"]
_TIGHT = ["--max-num-seqs", "8", "--max-model-len", "4096", "--kv-cache-memory-bytes", "48M"]
_TIERS = ["--pa-memory", "12M", "--session-host-memory", "24M"]
_DISK = 24 * 2**20


@dataclass
class Tally:
    """What happened."""

    operations: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    comparisons: int = 0
    kills: int = 0
    cuts: int = 0
    failures: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "operations": sum(self.operations.values()), "kinds": dict(self.operations.most_common()),
            "comparisons": self.comparisons, "mismatches": len(self.failures), "kills": self.kills,
            "cut_off": self.cuts,
            "sessions_were": dict(self.states.most_common()), "refused": dict(self.refusals.most_common()),
        }  # fmt: skip


class Worker:
    """One client of both servers, with sessions that are its own.

    Args:
        rough: the disturbed server's address. calm: the other's; None compares nothing. key: whose requests these are.
        name: begins its sessions' names. leaves: the share of requests that it gives up.
    """

    def __init__(
        self,
        rough: str,
        calm: str | None,
        key: str,
        name: str,
        seed: int,
        leaves: float,
        tally: Tally,
        flavours: list[str],
        *,
        is_lenient: bool,
    ) -> None:
        limits, headers = httpx.Limits(max_keepalive_connections=4), {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(_PATIENCE, connect=10.0)
        self._rough, self._calm = (
            httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout)
            for url in (rough, calm or rough)
        )
        self._compares, self._is_lenient = calm is not None, is_lenient
        self._rng, self._leaves, self._tally, self._flavours = random.Random(seed), leaves, tally, flavours
        self._sessions = [f"{name}-{one}" for one in _NAMES]
        self._logs: dict[str, list[dict[str, str]]] = {}  # messages that a session stands for
        self._chain: tuple[str, str] | None = None  # the last response, by server
        self._cut_off: set[str] = set()  # conversations, in a response that had happened
        self._kills = 0  # that this worker knows of: a restart forgets responses, and what conversations said

    async def run(self, until: float, requests: int | None = None) -> None:
        """Operations until a time, or so many."""
        done = 0
        async with self._rough, self._calm:
            while time.monotonic() < until and not self._tally.failures and (requests is None or done < requests):
                operation = draw(self._rng, self._sessions, self._logs, self._chain is not None, self._flavours)
                self._tally.operations[operation.kind] += 1
                try:
                    await self._do(operation)
                except Failure as failure:
                    self._tally.failures.append(f"{operation}: {failure}")
                done += 1

    async def _do(self, operation: Operation) -> None:
        needs_responses = operation.kind in ("response", "conversation", "forget")
        if self._kills != self._tally.kills:
            await self._look_after_a_kill()
        leaves = self._rng.random() < self._leaves
        mine = await operation.run(self._rough, 0, self._chain, self._rng.random() ** 2 * 0.4 if leaves else None)
        if needs_responses and self._kills != self._tally.kills:
            return  # killed meanwhile: what is left is looked at before the next of these
        if not self._compares:
            self._tally.cuts += mine is None
            if mine is not None and mine.status < 400:
                operation.note(self._logs, mine)
                self._chain = (mine.response, mine.response) if mine.response is not None else self._chain
            elif mine is not None:
                self._tally.refusals[f"{operation.kind}: {mine.status} {mine.code}"] += 1
            if operation.kind == "forget":
                self._chain = None
            return
        if operation.kind == "forget":
            self._chain, forgotten = None, self._chain
            theirs = await operation.run(self._calm, 1, forgotten, None)
            if mine is not None and mine.status < 500:
                self._compare(operation, mine, theirs)
            return
        if mine is None:
            self._tally.cuts += 1
            if not await self._has_happened(operation):
                return
            if operation.kind == "conversation":
                self._cut_off.add(operation.touches[0])
        elif mine.code == "conversation_not_found" and operation.touches[0] in self._cut_off:
            await self._begin_again(operation.touches[0])
            return
        elif mine.status >= 400:
            self._tally.refusals[f"{operation.kind}: {mine.status} {mine.code}"] += 1
            if mine.status < 500 and mine.status != 429:
                theirs = await operation.run(self._calm, 1, self._chain, None)
                self._compare(operation, mine, theirs)
                return
            if not await self._has_happened(operation):
                return
        theirs = await operation.run(self._calm, 1, self._chain, None)
        assert theirs is not None
        if mine is not None and mine.status < 400:
            self._compare(operation, mine, theirs)
            if mine.response is not None and theirs.response is not None:
                self._chain = mine.response, theirs.response
        operation.note(self._logs, theirs)
        for session in operation.touches:
            await self._compare_sessions(operation, session)

    async def _look_after_a_kill(self) -> None:
        """A restart forgets responses, what conversations said, and sessions that are empty."""
        self._kills, self._chain = self._tally.kills, None
        self._cut_off.clear()
        for client in (self._rough, self._calm):
            await self._until(client, "DELETE", f"/v1/sessions/{self._sessions[0]}-talk")
        for session in self._sessions:
            theirs = await self._shown(self._calm, session)
            if theirs == _EMPTY and await self._shown(self._rough, session) is None:
                await self._until(self._calm, "DELETE", f"/v1/sessions/{session}")

    async def _begin_again(self, conversation: str) -> None:
        """Its first response was cut off between the session's commit and its messages, which is refused by name."""
        self._tally.refusals["conversation: begun again after a cut"] += 1
        self._cut_off.discard(conversation)
        for client in (self._rough, self._calm):
            await self._until(client, "DELETE", f"/v1/sessions/{conversation}")

    def _compare(self, operation: Operation, mine: Outcome, theirs: Outcome | None) -> None:
        self._tally.comparisons += 1
        if mine.state:
            self._tally.states[mine.state] += 1
        assert theirs is not None
        if self._is_lenient and operation.kind == "delete" and max(mine.status, theirs.status) <= 404:
            return  # what a write that failed left behind may be there to be deleted
        problem = mine.differs(theirs)
        if problem:
            self._tally.failures.append(f"{operation}: {problem}")

    async def _compare_sessions(self, operation: Operation, session: str) -> None:
        mine, theirs = await self._shown(self._rough, session), await self._shown(self._calm, session)
        self._tally.comparisons += 1
        if mine != theirs:
            self._tally.failures.append(f"after {operation}, {session} is {mine}, not {theirs}")

    async def _has_happened(self, operation: Operation) -> bool:
        """After a cut: whether the disturbed server has carried it out, which nothing but its session tells."""
        if not operation.touches:
            return False
        session = operation.touches[-1]
        deadline = time.monotonic() + _PATIENCE
        unchanged = time.monotonic()
        while True:  # a request that was given up ends soon, but not at once, and may not have begun yet
            # a session that is begun is there before anything has happened to it
            is_busy = await self._is_busy(session)
            mine, theirs = await self._shown(self._rough, session), await self._shown(self._calm, session)
            if is_busy or await self._is_busy(session):
                unchanged = time.monotonic()
            elif mine != theirs:
                return True
            elif time.monotonic() > unchanged + _SETTLED:
                return False
            if time.monotonic() > deadline:
                self._tally.failures.append(f"{session} is in use for ever after {operation} was cut off")
                return False
            await asyncio.sleep(0.05)

    async def _is_busy(self, session: str) -> bool:
        found = await self._get(self._rough, f"/v1/sessions/{session}")
        return found.status_code == 200 and bool(found.json().get("in_use"))

    async def _shown(self, client: httpx.AsyncClient, session: str) -> dict[str, Any] | None:
        found = await self._get(client, f"/v1/sessions/{session}")
        if found.status_code == 404:
            return None
        shown = found.json()
        return {name: shown.get(name) for name in ("commits", "tokens")}

    async def _get(self, client: httpx.AsyncClient, path: str) -> httpx.Response:
        return await self._until(client, "GET", path)

    async def _until(self, client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
        """An answer that tells, however long the server is away."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(httpx.TransportError):
                found = await client.request(method, path)
                if found.status_code in (200, 202, 404):
                    return found
            if time.monotonic() > deadline:
                raise SystemExit(f"{path}: no answer for {_PATIENCE:.0f} s")
            await asyncio.sleep(0.05)


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
            with filler.open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            await asyncio.sleep(1 + 4 * rng.random())
            filler.unlink()
    finally:
        filler.unlink(missing_ok=True)


async def watch(server: OwnServer, every: float, samples: list[dict[str, int]], tally: Tally) -> None:
    """What the server holds, every so many seconds."""
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=_PATIENCE) as client:
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
    for name, slack in (("mib", 0.05), ("descriptors", 0.25), ("threads", 0.0), ("series", 0.02)):
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


@contextlib.contextmanager
def folder_of(phase: str) -> Iterator[Path]:
    """Where the disturbed server keeps sessions."""
    if phase == "disk":
        with small_disk(_DISK) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def flags_of(phase: str, layout: Path | None) -> list[str]:
    """What both servers have."""
    flags = []
    for key in KEYS[1:]:
        flags += ["--api-key", key]
    if phase == "acting":
        flags += ["--pa-preset", "reference"]
    if phase == "ranks":
        flags += ["--tensor-parallel-size", "2"]
    if phase == "experts":
        assert layout is not None
        flags += ["--ce-layout", str(layout), "--ce-density", "0.5", "--accept-worse-answers"]
    return flags


def flavours_of(phase: str) -> list[str]:
    """What an operation may ask for beside the usual."""
    if phase == "ranks":
        return ["observe", "off"]
    return ["observe", "off", "reference", "paper", "read_only", *(["dense"] if phase == "experts" else [])]


async def run(
    args: argparse.Namespace, phase: str, layout: Path | None, seconds: float
) -> tuple[Tally, dict[str, Any]]:
    """One phase."""
    tally, rng, samples = Tally(), random.Random(f"{args.seed} {phase}"), []  # type: ignore[var-annotated]
    with folder_of(phase) as folder, contextlib.ExitStack() as stack:
        flags = flags_of(phase, layout)
        sync = ["--session-sync"] if phase != "steady" else []
        stored = [*_TIERS, "--session-dir", str(folder), *sync] if phase != "ranks" else []
        rough = OwnServer([*flags, *_TIGHT, *stored])
        calm = OwnServer([*flags, *_CALM])
        for server in (rough, calm) if phase != "steady" else (rough,):
            stack.callback(server.stop)
            await asyncio.to_thread(server.start)
        until = time.monotonic() + (seconds if phase != "steady" else 1e9)
        leaves = 0.33 if phase == "steady" else 0.15
        share = args.requests // args.workers if phase == "steady" else None
        workers = [
            Worker(
                rough.url, None if phase == "steady" else calm.url, KEYS[number % 2], f"w{number // 2}",
                rng.randrange(2**32), leaves, tally, flavours_of(phase), is_lenient=phase == "disk",
            ).run(until, share)
            for number in range(args.workers)
        ]  # fmt: skip
        beside = []
        if phase == "steady":
            beside.append(asyncio.create_task(watch(rough, args.sample, samples, tally)))
        elif phase != "ranks":
            beside.append(asyncio.create_task(kill_often(rough, args.every, until - 5, tally, rng)))
        if phase == "disk":
            beside.append(asyncio.create_task(fill_disk(folder, until - 5, rng)))
        await asyncio.gather(*workers)
        for task in beside:
            if phase == "steady" or tally.failures:
                task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        if phase == "steady" and not args.small:
            tally.failures += grown(samples)
        if phase != "disk" and (found := rough.log().find("Traceback")) >= 0:
            tally.failures.append(f"the server logged an exception: {rough.log()[max(0, found - 500) : found + 4000]}")
    return tally, {"curve": samples} if samples else {}


def made_layout(folder: str) -> Path:
    """A layout of the bundled model."""
    from pacellm.demo import MODEL_PATH
    from pacellm.experts.apply import model_fingerprint, weight_features
    from pacellm.experts.cluster import shuffled
    from pacellm.experts.layout import Layout
    from pacellm.model.load import load

    module, path = load(MODEL_PATH).module, Path(folder) / "layout.safetensors"
    layers = {layer: shuffled(one, 16, layer) for layer, one in weight_features(module).items()}
    Layout(layers, "random", "none", 0, model_fingerprint(module), {}).save(path)
    return path


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__, takes_url=False)
    found.add_argument("--minutes", type=float, default=60.0, help="of all phases but the last")
    found.add_argument("--every", type=float, default=25.0, help="seconds between kills, about")
    found.add_argument("--workers", type=int, default=6)
    found.add_argument("--requests", type=int, default=10_000, help="of the phase steady")
    found.add_argument("--sample", type=float, default=5.0, help="seconds between looks at memory")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    args = found.parse_args(arguments)
    if args.small:
        args.minutes, args.every, args.requests, args.sample = 0.4, 6.0, 120, 0.5
        args.phases = ["tiers", "steady"]
    timed = [phase for phase in args.phases if phase != "steady"]
    facts: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        layout = made_layout(folder) if "experts" in args.phases else None
        for phase in args.phases:
            started = time.monotonic()
            tally, more = asyncio.run(run(args, phase, layout, 60 * args.minutes / max(1, len(timed))))
            facts[phase] = {"seconds": round(time.monotonic() - started), **tally.facts(), **more}
            failures += [f"{phase}: {failure}" for failure in tally.failures]
            for failure in tally.failures:
                print(f"{phase}: {failure}", flush=True)
            print(phase, {name: value for name, value in facts[phase].items() if name != "curve"}, flush=True)
    return report("histories", {"seed": args.seed, "phases": facts}, failures)


if __name__ == "__main__":
    raise SystemExit(main())
