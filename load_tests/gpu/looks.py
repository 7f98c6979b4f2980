"""Looking closer: where a step's time goes, what fixed shapes cost, and growth as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from load_tests.gpu import rig as rigs
from load_tests.gpu.rig import Rig, request, run
from pacellm.engine.engine import Engine

Cells = dict[str, Any]
TOP = 24


def profiles(rig: Rig, limits: Cells) -> Cells:
    """The costliest operations of one prefill chunk deep in a prompt, and of one decode step of 16 sequences."""
    length, batch, context = (300, 2, 40) if rig.small else (65_536, 16, 4096)
    cells: Cells = {}
    with rig.engine(length + 1024) as engine:
        engine.add(request("long", rig.ids(length, 60), 1))
        while engine.scheduler.running == [] or engine.scheduler.running[0].cursor < length // 2:
            engine.step()
        cells["prefill_chunk"] = profiled(rig, engine)
    with rig.engine(batch * (context + 600)) as engine:
        rigs.fill(engine, [request(str(n), rig.ids(context, n), 400 if not rig.small else 40) for n in range(batch)])
        rigs.decode_seconds(rig, engine, 3)
        cells["decode_step"] = profiled(rig, engine)
    return cells


def profiled(rig: Rig, engine: Engine, steps: int = 1) -> Cells:
    """A step's operations by their own time, on the device where there is one; ``steps`` are looked at."""
    kinds = [ProfilerActivity.CUDA] if rig.is_cuda else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        seconds = rig.seconds(lambda: [engine.step() for _ in range(steps)]) / steps
    name = "self_device_time_total" if rig.is_cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) / 1e6 / steps
    top = [
        {"operation": event.key[:90], "calls": event.count / steps, "seconds": getattr(event, name) / 1e6 / steps}
        for event in events[:TOP]
    ]  # fmt: skip
    return {"step_seconds": seconds, "operation_seconds": total, "top": top}


def deterministic(rig: Rig, limits: Cells) -> Cells:
    """``--deterministic`` against the default: a prefill, and a decode step of 1 and 16 sequences."""
    length, shapes, context = (300, (1, 2), 40) if rig.small else (32_768, (1, 16), 4096)
    cells: Cells = {}
    for batch in (0, *shapes):
        pair = []
        for fixed in (False, True):
            with rig.engine(max(length, batch * (context + 600)), deterministic=fixed) as engine:
                if not batch:
                    run(engine, request("warm", rig.ids(length, 61), 1))
                    pair.append(rig.seconds(lambda e=engine: run(e, request("x", rig.ids(length, 62), 1))))
                else:
                    new = 400 if not rig.small else 40
                    rigs.fill(engine, [request(str(n), rig.ids(context, n), new) for n in range(batch)])
                    pair.append(rigs.decode_seconds(rig, engine, 4 if rig.small else 50))
        name = f"decode_{batch}" if batch else "prefill"
        cells[name] = {"seconds": pair[0], "deterministic_seconds": pair[1], "ratio": pair[1] / pair[0]}
    return cells


def ahead(rig: Rig, limits: Cells) -> Cells:
    """Decode steps launched before the last one's tokens are read, against steps that wait; and drawn tokens."""
    shapes, context = ((1, 3), 40) if rig.small else ((1, 16, 64), 4096)
    steps, new = (4, 40) if rig.small else (50, 400)
    cells: Cells = {}
    for batch in shapes:
        cell: Cells = {}
        for name, runs_ahead, temperature in (("waits", False, 0.0), ("ahead", True, 0.0), ("drawn", True, 1.0)):
            with rig.engine(batch * (context + 600), async_scheduling=runs_ahead) as engine:
                asked = [request(str(n), rig.ids(context, n), new, temperature=temperature) for n in range(batch)]
                rigs.fill(engine, asked)
                cell[name] = rigs.decode_seconds(rig, engine, steps)
                cell[f"{name}_steps_ahead"] = engine.stats.steps_ahead
                cell[f"{name}_tokens"] = [list(sequence.generated[:steps]) for sequence in engine.scheduler.running]
        waited, ran = cell.pop("waits_tokens"), cell.pop("ahead_tokens")
        cell |= {"same_tokens": waited == ran, "ratio": cell["ahead"] / cell["waits"]}
        del cell["drawn_tokens"]
        cells[str(batch)] = cell
    return cells


def draw_growth(cells: Cells, path: Path) -> None:
    """Prefill seconds beside their floor, a decode step, and KV memory, against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted(int(name) for name in cells if name.isdigit())
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, names, title in (
        (axes[0], ("prefill_seconds", "floor_seconds"), "Reading a prompt, seconds"),
        (axes[1], ("decode_seconds",), "A decode step, seconds"),
        (axes[2], ("kv_bytes",), "KV memory, bytes"),
    ):
        for name in names:
            axis.loglog(lengths, [cells[str(length)][name] for length in lengths], "o-", label=name.replace("_", " "))
        axis.set(xlabel="tokens", title=title)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
