"""Looking closer: where a step's time goes, and what fixed shapes cost."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from load_tests.gpu import rig as rigs
from load_tests.gpu.rig import Rig, request, run
from pacellm.engine.engine import Engine

Cells = dict[str, Any]
TOP = 24


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
