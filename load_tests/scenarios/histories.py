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
Its server's stores are small, so that they are full early, and what grows after the first quarter is a leak.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from load_tests.scenarios.disturbances import fill_disk, grown, kill_often, small_disk, watch
from load_tests.scenarios.servers import OwnServer, parser, report
from load_tests.scenarios.twins import Tally, Worker

KEYS = ("load-tests", "other-tests")
PHASES = ("tiers", "acting", "experts", "ranks", "disk", "steady")
_CALM = ["--max-num-seqs", "8", "--max-model-len", "4096", "--kv-cache-memory-bytes", "256M"]
_TIGHT = ["--max-num-seqs", "8", "--max-model-len", "4096", "--kv-cache-memory-bytes", "48M"]
_TIERS = ["--pa-memory", "12M", "--session-host-memory", "24M"]
_FULL_EARLY = ["--response-memory", "512K", "--session-disk-size", "128M"]
"""Of the phase steady: what grows up to a budget by default has reached it before memory is compared."""
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""The same: glibc gives blocks of this size and more back once they are free, so that what is resident is in use. By
default it keeps them, and they are cut up: 200 MiB over 10,000 requests."""
_DISK = 24 * 2**20


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
        more = ["--session-sync"] if phase != "steady" else _FULL_EARLY
        stored = [*_TIERS, "--session-dir", str(folder), *more] if phase != "ranks" else []
        rough = OwnServer([*flags, *_TIGHT, *stored], _GIVES_BACK if phase == "steady" else None)
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
            beside.append(asyncio.create_task(watch(rough, KEYS[0], args.sample, samples, tally)))
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
        if tally.failures:
            print(f"{phase}: the disturbed server's log ends with {rough.log()[-4000:]}", flush=True)
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
