"""The GPU's work beside its limits and beside transformers: ``python load_tests/gpu_bench.py``.

Qwen2.5-7B's shape with random weights built on the device. ``--parts`` chooses what is measured, each part within ten
minutes on one H100 or H200; results are added to ``--output`` part by part, and parts that are there already are left
out unless ``--again``. ``--small`` runs everything on a tiny model on a CPU: a test of the script, no measurement.

Floors: prefill is FLOPs over the measured matrix rate, decode bytes over the measured copy rate. ``of_limit`` is floor
over time: 1.0 is the limit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_tests.gpu import looks
from load_tests.gpu import rig as rigs
from load_tests.gpu.kernels import kernels
from load_tests.gpu.rig import Rig, request, run
from load_tests.gpu.sets import sets
from pacellm.engine import pace
from pacellm.types import Delta, Finished

Cells = dict[str, Any]


def prefill(rig: Rig, limits: Cells) -> Cells:
    """One long prompt, beside its floor and transformers' generate."""
    length = 300 if rig.small else 200_000
    floor = rig.prefill_flops(length) / limits["matrix_flops"]
    cells: Cells = {"tokens": length, "floor_seconds": floor}
    for name, pa in (("engine", False), ("engine_pa", True)):
        with rig.engine(length, pa=pa) as engine:
            run(engine, request("warm", rig.ids(min(length, 20_000), 1), 1))
            cells[name] = rig.seconds(lambda e=engine: run(e, request("x", rig.ids(length, 2), 1)))
            layers = engine.config.pa_layers or ()
            cells["attention_kernel"] = "cpu" if engine.kernel is None else engine.kernel.name
    if rig.released is not None:
        with rig.authors(layers) as module:
            cells["generate_authors"] = _or_error(lambda: rigs.generate_seconds(rig, module, rig.ids(length, 2), 1))
    with rig.peer() as module:
        cells["generate"] = _or_error(lambda: rigs.generate_seconds(rig, module, rig.ids(length, 2), 1))
    return cells | _shares(cells, floor, ("engine", "engine_pa", "generate", "generate_authors"))


def decode(rig: Rig, limits: Cells) -> Cells:
    """A step of 1, 16 and 64 sequences at 4K and of 8 at 64K, PA on and off, beside transformers'."""
    shapes = [(1, 40), (3, 40)] if rig.small else [(1, 4096), (16, 4096), (64, 4096), (8, 65_536)]
    steps = 4 if rig.small else 50
    cells: Cells = {}
    for batch, context in shapes:
        prompts = [rig.ids(context, seed) for seed in range(batch)]
        cell: Cells = {"batch": batch, "context": context}
        for name, pa in (("engine", False), ("engine_pa", True)):
            with rig.engine(batch * (context + 600), pa=pa) as engine:
                new = steps + 400 if not rig.small else 60
                rigs.fill(engine, [request(str(n), ids, new) for n, ids in enumerate(prompts)])
                cell[name] = rigs.decode_seconds(rig, engine, steps)
                layers = len(engine.config.pa_layers or ()) if pa else 0
        floor = rig.decode_bytes([context] * batch) / limits["copy_bytes"]
        cell["floor_seconds"] = floor
        cell["floor_seconds_pa"] = rig.decode_bytes([context] * batch, banks=layers) / limits["copy_bytes"]
        cell["pa_costs"] = cell["engine_pa"] / cell["engine"] - 1.0
        with rig.peer() as module:
            if batch == 1:
                cell["generate"] = _step(lambda n, p=prompts: rigs.generate_seconds(rig, module, p[0], n), steps)
            cell["continuous"] = _step(lambda n, p=prompts: rigs.continuous_seconds(rig, module, p, n), steps)
        cells[f"{batch}x{context}"] = cell | _shares(cell, floor, ("engine", "engine_pa", "generate", "continuous"))
    return cells


def mixed(rig: Rig, limits: Cells) -> Cells:
    """A long prefill beside 32 streams, at two shares of a step's time."""
    streams, context, length = (2, 40, 400) if rig.small else (32, 4096, 200_000)
    cells: Cells = {}
    with rig.engine(length) as engine:
        cells["lone_prefill"] = rig.seconds(lambda: run(engine, request("lone", rig.ids(length, 3), 1)))
    share = pace.SHARE
    for wanted in (2.0, 5.0):
        pace.SHARE = wanted
        try:
            settings: Cells = {"max_num_mixed_tokens": 64 if rig.small else 8192, "max_num_seqs": streams + 1}
            new = 300 if rig.small else 4000
            with rig.engine(streams * (context + new) + length, **settings) as engine:
                rigs.fill(engine, [request(str(n), rig.ids(context, n), new) for n in range(streams)])
                alone = [rig.seconds(engine.step) for _ in range(4 if rig.small else 200)]
                engine.add(request("long", rig.ids(length, 3), 1))
                beside, is_read, started = [], False, time.perf_counter()
                while not is_read:
                    before = time.perf_counter()
                    is_read = any(name == "long" and isinstance(event, Delta) for name, event in engine.step())
                    beside.append(time.perf_counter() - before)
                seconds = time.perf_counter() - started
        finally:
            pace.SHARE = share
        cells[f"share_{wanted:g}"] = {
            "alone_p99": _p99(alone),
            "beside_p99": _p99(beside),
            "times_alone": _p99(beside) / _p99(alone),
            "prefill_seconds": seconds,
            "prefill_speed_of_lone": cells["lone_prefill"] / seconds,
        }
    return cells


def second(rig: Rig, limits: Cells) -> Cells:
    """A second question in a long session: its KV resident, in host memory, on disk. Ids, so without tokenizing."""
    length, question = (200, 20) if rig.small else (200_000, 200)
    nbytes = length * rig.model.bytes_per_token
    cells: Cells = {"tokens": length, "bytes": nbytes}
    with tempfile.TemporaryDirectory(dir=rig.folder) as folder:
        for tier in ("resident", "host", "disk"):
            settings: Cells = {"session_memory": 4 * nbytes + 2**26, "session_host_memory": 0}
            if tier == "host":
                settings["session_host_memory"] = 4 * nbytes + 2**26
            if tier == "disk":
                settings["session_dir"] = str(Path(folder) / "sessions")
            with rig.engine(2 * length + 4096, **settings) as engine:
                history = rig.ids(length, 4)
                events = run(engine, request("first", history, 4, session="s"))
                history = history + _tokens(events["first"])
                if tier != "resident":
                    engine.sessions.evict_one()
                    engine.worker.finish()
                ids = history + rig.ids(question, 5)
                again = request(tier, ids, 1, "s")
                seconds = rig.seconds(lambda e=engine, item=again: cells.update(_ended(run(e, item))))
                bare = rig.seconds(lambda e=engine, p=ids: run(e, request("bare", p + rig.ids(question, 6), 1, "s")))
                stats = engine.mover.stats
                cells[tier] = {
                    "seconds": seconds,
                    "session": cells.pop("session"),
                    "bare_seconds": bare,
                    "restore_seconds": stats.restore_seconds,
                    "spill_seconds": stats.spill_seconds,
                }
    cells["host"]["copy_floor"] = nbytes / limits["host_to_device_bytes"]
    cells["disk"]["copy_floor"] = nbytes / limits["disk_read_bytes"]
    return cells


def forks(rig: Rig, limits: Cells) -> Cells:
    """16 forks of one document beside 16 separate sessions, and 16 forks of a longer one."""
    count = 3 if rig.small else 16
    cells: Cells = {}
    for length, separate in ((100, True), (200, False)) if rig.small else ((100_000, True), (200_000, False)):
        room = {"session_memory": 2**50, "max_num_seqs": count + 1}
        cell: Cells = {"count": count, "tokens": length}
        with rig.engine(length + count * 2048, **room) as engine:
            started = time.perf_counter()
            run(engine, request("document", rig.ids(length, 7), 1, session="s"))
            before = engine.allocator.num_free
            for number in range(count):
                done = engine.ops.submit(engine.ops.fork(("bench", "s"), ("bench", f"f{number}"), None))
                engine.step()
                done.result(timeout=60)
            cell["bytes_added_each"] = (before - engine.allocator.num_free) * engine.block_bytes / count
            log = list(engine.sessions.get(("bench", "s")).context)  # type: ignore[union-attr]
            asked = [request(f"q{n}", log + rig.ids(32, 20 + n), 120, session=f"f{n}") for n in range(count)]
            rigs.fill(engine, asked)
            cell["forks_seconds"] = time.perf_counter() - started
            cell["step"] = rigs.decode_seconds(rig, engine, 4 if rig.small else 50)
            floor = rig.decode_bytes([length + 40] * count, banks=2, shared=length) / limits["copy_bytes"]
            cell |= {"floor_seconds": floor, "of_limit": floor / cell["step"]}
        if separate:
            cell["separate_seconds"] = _or_error(lambda n=length: _separate(rig, n, count))
            if isinstance(cell["separate_seconds"], float):
                cell["times_faster"] = cell["separate_seconds"] / cell["forks_seconds"]
        cells[str(length)] = cell
    return cells


def _separate(rig: Rig, length: int, count: int) -> float:
    with rig.engine(count * (length + 1024), session_memory=2**50, max_num_seqs=count) as engine:
        asked = [request(f"q{n}", rig.ids(length, 30 + n), 120, session=f"s{n}") for n in range(count)]
        return rig.seconds(lambda: rigs.fill(engine, asked))


def cost_of_pa(rig: Rig, limits: Cells) -> Cells:
    """PA on against off in prefill, in turn, so that both see the same clocks."""
    length, rounds = (200, 2) if rig.small else (32_768, 5)
    pairs = []
    for number in range(rounds + 1):
        pair = []
        for pa in (False, True):
            with rig.engine(length, pa=pa) as engine:
                pair.append(rig.seconds(lambda e=engine, n=number: run(e, request("x", rig.ids(length, 40 + n), 1))))
        if number:  # the first warms up
            pairs.append(pair)
    ratios = [on / off for off, on in pairs]
    return {"tokens": length, "pairs": pairs, "ratio": statistics.median(ratios), "ratios": ratios}


def growth(rig: Rig, limits: Cells) -> Cells:
    """Prefill, KV bytes and a decode step against length."""
    lengths = [32, 64, 128, 256] if rig.small else [2**power for power in range(10, 19)]
    cells: Cells = {}
    for length in lengths:
        with rig.engine(length + 1024) as engine:
            seconds = rig.seconds(lambda e=engine, n=length: rigs.fill(e, [request("x", rig.ids(n, 50), 80)]))
            step = rigs.decode_seconds(rig, engine, 4 if rig.small else 30)
            held = (engine.num_blocks - engine.allocator.num_free) * engine.block_bytes
        floor = rig.prefill_flops(length) / limits["matrix_flops"]
        cells[str(length)] = {
            "prefill_seconds": seconds, "floor_seconds": floor, "of_limit": floor / seconds, "decode_seconds": step,
            "kv_bytes": held,
        }  # fmt: skip
    cells["fit"] = _fit([(length, cells[str(length)]["prefill_seconds"]) for length in lengths])
    return cells


def _fit(points: list[tuple[int, float]]) -> Cells:
    """Least squares of seconds = a + b n + c n²."""
    n = torch.tensor([float(length) for length, _ in points], dtype=torch.float64)
    y = torch.tensor([seconds for _, seconds in points], dtype=torch.float64)
    scale = n.max()
    x = torch.stack([torch.ones_like(n), n / scale, (n / scale) ** 2], dim=1)
    a, b, c = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist()
    residual = (x @ torch.tensor([a, b, c], dtype=torch.float64) - y).abs().max()
    return {"a": a, "b": b / float(scale), "c": c / float(scale) ** 2, "largest_residual": float(residual)}


PARTS: dict[str, Callable[[Rig, Cells], Cells]] = {
    "prefill": prefill,
    "decode": decode,
    "mixed": mixed,
    "second": second,
    "forks": forks,
    "pa": cost_of_pa,
    "growth": growth,
    "sets": sets,
    "ahead": looks.ahead,
    "kernels": kernels,
    "deterministic": looks.deterministic,
    "profiles": looks.profiles,
}


def _or_error(work: Callable[[], float]) -> float | str:
    """Seconds, or why there are none: a peer that runs out of memory is a result too."""
    try:
        return work()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _step(seconds_of: Callable[[int], float], steps: int) -> float | str:
    """A peer's step: what ``steps`` tokens more cost, divided by their number."""
    return _or_error(lambda: [seconds_of(2), (seconds_of(1 + steps) - seconds_of(1)) / steps][1])


def _shares(cell: Cells, floor: float, names: tuple[str, ...]) -> Cells:
    return {f"{name}_of_limit": floor / cell[name] for name in names if isinstance(cell.get(name), float)}


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def _tokens(events: list[Any]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def _ended(events: dict[str, list[Any]]) -> Cells:
    return {"session": next(e.session for found in events.values() for e in found if isinstance(e, Finished))}


def _draw(cells: Cells, path: Path) -> None:
    try:
        looks.draw_growth(cells, path)
    except ImportError:
        print("matplotlib is not installed: no picture of growth", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("gpu_bench.json"))
    parser.add_argument("--again", action="store_true", help="measure parts that the file has already")
    parser.add_argument("--small", action="store_true", help="a tiny model on a CPU, to test this script")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary one)")
    parser.add_argument("--peer", type=Path, help="checkout of the authors' released code: prefill beside it too")
    args = parser.parse_args(arguments)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--parts: {', '.join(sorted(unknown))} unknown; these are: {', '.join(PARTS)}")
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --small tests the script on a CPU")

    device = torch.device("cpu" if args.small else "cuda")
    rig = rigs.build(device, small=args.small, folder=args.folder, released=args.peer)
    found: Cells = json.loads(args.output.read_text()) if args.output.exists() else {}
    machine = platform.processor() if args.small else torch.cuda.get_device_name()
    if found.get("small", args.small) != args.small or found.get("device", machine) != machine:
        raise SystemExit(f"{args.output} is of another device; give another --output")
    found |= {
        "bench": "gpu", "small": args.small, "device": machine, "torch": torch.__version__,
        "transformers": transformers.__version__, "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    found["limits"] = rigs.limits(device, small=args.small, folder=args.folder)
    for name in parts:
        if args.again or name not in found:
            started = time.perf_counter()
            found[name] = PARTS[name](rig, found["limits"])
            found[name]["part_seconds"] = time.perf_counter() - started
            args.output.write_text(json.dumps(found, indent=1) + "\n")
            if name == "growth":
                _draw(found[name], args.output.with_suffix(".png"))
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
