"""What a session costs in each tier: ``python load_tests/session_bench.py``.

One session of ``--tokens`` tokens on the bundled model: its prefill, and a follow-up of ``--new`` tokens with its state
resident, in host memory, on disk (the page cache emptied of it) and replayed from its log; a fork of it; then
``--sessions`` short sessions over a pool of ``--pool`` bank rows. All in one process, one after the other; a follow-up
is not committed, so that each starts from the same state. Runner seconds are those inside the model. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.model.load import load
from pacellm.sessions.disk import STATE
from pacellm.types import Finished, GenerationRequest, SamplingParams

KEY = ("default", "document")
ONE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


class Timed:
    """An engine whose time inside the model is counted."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(load(MODEL_PATH), config)
        self.inside = 0.0
        inner = self.engine.runner.run

        def run(step):
            started = time.perf_counter()
            try:
                return inner(step)
            finally:
                self.inside += time.perf_counter() - started

        self.engine.runner.run = run  # type: ignore[method-assign]

    def ask(self, prompt: list[int], key: tuple[str, str], *, commit: bool = True) -> tuple[float, float, Finished]:
        """(seconds to the last event, seconds inside the model, that event)."""
        engine = self.engine
        engine.add(GenerationRequest("x", prompt, ONE, session=key, commit=commit))
        started, self.inside = time.perf_counter(), 0.0
        while engine.has_work:
            for _, event in engine.step():
                if isinstance(event, Finished):
                    return time.perf_counter() - started, self.inside, event
        raise RuntimeError("the request did not finish")

    def operate(self, operation) -> Any:
        """A session operation's result."""
        future = self.engine.call(operation)
        while not future.done():
            self.engine.step()
        return future.result()


def forget_pages(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(path: Path) -> float:
    """Seconds that reading a file takes that is not in the page cache."""
    forget_pages(path)
    buffer = bytearray(16 * 2**20)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def long_session(tokens: int, new: int, rounds: int, directory: str) -> dict[str, Any]:
    """The table of one long session."""
    memory = (tokens + 16_384) * 7680
    timed = Timed(EngineConfig(kv_cache_memory=memory + memory // 8, session_memory=memory, session_dir=directory))
    engine = timed.engine
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(6, 2000, (tokens,), generator=generator).tolist()
    follow_up = document + torch.randint(6, 2000, (new,), generator=generator).tolist()
    _say(f"reading {tokens:,} tokens")
    prefill, _, _ = timed.ask(document, KEY)
    _say("follow-ups, from each tier")
    session = engine.sessions.get(KEY)
    assert session is not None
    rows: dict[str, list[tuple[float, float]]] = {}

    def measure(name: str, expected: str) -> None:
        engine.prefix_cache.clear()
        seconds, inside, end = timed.ask(follow_up, KEY, commit=False)
        if end.session != expected:
            raise RuntimeError(f"{name}: {end.session}, {end.note}")
        rows.setdefault(name, []).append((seconds, inside))

    measure("warm up", "resident")
    moves = []
    for _ in range(rounds):
        measure("resident", "resident")
        session.stored, engine.mover.host.capacity = None, 2 * memory
        engine.eviction.evict(session)
        run_until_idle(engine)
        before = engine.mover.stats.restore_seconds
        measure("host", "restored")
        moves.append(engine.mover.stats.restore_seconds - before)
        session.stored, engine.mover.host.capacity = None, 0
        engine.eviction.evict(session)
        run_until_idle(engine)
        path = engine.mover.disk.folder(KEY) / STATE  # type: ignore[union-attr]
        raw, size = read_seconds(path), path.stat().st_size
        rows.setdefault("raw read of the file", []).append((raw, 0.0))
        forget_pages(path)
        measure("disk", "restored")
        session.stored = len(session.context)
        engine.eviction.evict(session)
        run_until_idle(engine)
        measure("disk, in page cache", "restored")
    started = time.perf_counter()
    fork = timed.operate(engine.ops.fork(KEY, ("default", "fork"), None))
    fork_seconds = time.perf_counter() - started
    timed.operate(engine.ops.delete(("default", "fork")))
    engine.sessions.drop(session)
    _say("replaying the log")
    measure("replay", "replayed")

    def middle(name: str, which: int = 0) -> float:
        return statistics.median(row[which] for row in rows[name])

    result = {
        "tokens": tokens,
        "new": new,
        "prefill_seconds": round(prefill, 3),
        "state_bytes": size,
        **{f"{name.replace(', ', '_').replace(' ', '_')}_seconds": round(middle(name), 4) for name in rows},
        "resident_over_model": round(middle("resident") / middle("resident", 1), 3),
        "host_copy_seconds": round(statistics.median(moves), 4),
        "host_over_resident_plus_copy": round(middle("host") / (middle("resident") + statistics.median(moves)), 3),
        "disk_beyond_raw_read_and_resident_seconds": round(
            middle("disk") - middle("raw read of the file") - middle("resident"), 4
        ),
        "fork_seconds": round(fork_seconds, 5),
        "fork_bytes_added": fork["bytes_added"],
        "block_bytes": engine.block_bytes,
    }
    engine.close()
    return result


def many_sessions(count: int, pool: int, directory: str) -> dict[str, Any]:
    """Short sessions, ten times as many as there are rows, each asked twice."""
    model = load(MODEL_PATH)
    probe = Engine(model, EngineConfig(kv_cache_memory=2**28))
    each = probe.pool.bytes_per_row if probe.pool is not None else 0
    config, shapes = probe.config.bank, probe.pool.shapes if probe.pool is not None else []
    formula = sum(config.bank_size * (shape.inner + shape.hidden) * model.dtype.itemsize for shape in shapes)
    timed = Timed(
        EngineConfig(
            kv_cache_memory=2**30, pa_memory=(pool + 16) * each, session_host_memory=pool * 2 * 2**20,
            session_dir=directory, session_log_memory=64 * 2**10,
        )
    )  # fmt: skip
    engine = timed.engine
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(6, 2000, (count, 96), generator=generator).tolist()
    sizes, times, statuses = [], {"first": [], "second": []}, {}
    for turn, length in (("first", 64), ("second", 96)):
        for number, prompt in enumerate(prompts):
            seconds, _, end = timed.ask(prompt[:length], ("default", f"s{number}"))
            times[turn].append(seconds)
            statuses[f"{turn}, {end.session}"] = statuses.get(f"{turn}, {end.session}", 0) + 1
            if number % 100 == 99:
                run_until_idle(engine)
                sizes.append(_rss())
    run_until_idle(engine)
    stats = engine.mover.stats
    result = {
        "sessions": count,
        "pool": pool,
        "bytes_per_session": each,
        "formula_bytes": formula,
        "statuses": statuses,
        "rss_mib_by_hundred": [round(size / 2**20, 1) for size in sizes],
        "resident": engine.sessions.num_resident,
        "host_bytes": engine.mover.host.bytes,
        "log_bytes": engine.sessions.log_bytes,
        "spill_ms": round(1e3 * stats.spill_seconds / max(1, stats.spills), 3),
        "restore_ms": round(1e3 * stats.restore_seconds / max(1, stats.restores), 3),
        "first_ask_ms": round(1e3 * statistics.median(times["first"]), 2),
        "second_ask_ms": round(1e3 * statistics.median(times["second"]), 2),
    }
    engine.close()
    return result


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _rss() -> int:
    """Resident bytes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--new", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=100)
    parser.add_argument("--dir", default=None, help="where the session directory is made (default: as tempfile says)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        many = many_sessions(args.sessions, args.pool, f"{directory}/many")
        for name, value in many.items():
            print(f"{name:45} {value}")
        long = long_session(args.tokens, args.new, args.rounds, f"{directory}/long")
        for name, value in long.items():
            print(f"{name:45} {value}")
    print(json.dumps({"bench": "sessions", "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "long": long, "many": many}))  # fmt: skip


if __name__ == "__main__":
    main()
