"""What ``second_look.sh`` measures: forks, growth with length, and ``generate`` with the authors' module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from load_tests.gpu import rig as rigs
from load_tests.gpu.rig import Rig, request, run

Cells = dict[str, Any]


def forks(rig: Rig, limits: Cells) -> Cells:
    """16 forks of one document beside 16 separate sessions, and 16 forks of a longer one."""
    count = 3 if rig.small else 16
    cells: Cells = {}
    for length, separate in ((100, True), (200, False)) if rig.small else ((40_000, True), (200_000, False)):
        room = {"session_memory": 2**50, "max_num_seqs": count + 1}
        cell: Cells = {"count": count, "tokens": length}
        with rig.engine(length + count * 2048, **room) as engine:

            def forked(engine: Any = engine, length: int = length) -> None:
                run(engine, request("document", rig.ids(length, 7), 1, session="s"))
                for number in range(count):
                    done = engine.call(engine.ops.fork(("bench", "s"), ("bench", f"f{number}"), None))
                    engine.step()
                    done.result(timeout=60)
                log = list(engine.sessions.get(("bench", "s")).context)
                asked = [request(f"q{n}", log + rig.ids(32, 20 + n), 120, session=f"f{n}") for n in range(count)]
                rigs.fill(engine, asked)

            cell["forks_seconds"] = rig.seconds(forked)
            cell["step"] = rigs.decode_seconds(rig, engine, 4 if rig.small else 50)
            cell["bytes_held"] = (engine.num_blocks - engine.allocator.num_free) * engine.block_bytes
            floor = rig.decode_bytes([length + 40] * count, banks=2, shared=length) / limits["copy_bytes"]
            cell |= {"floor_seconds": floor, "of_limit": floor / cell["step"]}
        if separate:
            with rig.engine(count * (length + 1024), session_memory=2**50, max_num_seqs=count) as engine:
                asked = [request(f"q{n}", rig.ids(length, 30 + n), 120, session=f"s{n}") for n in range(count)]
                cell["separate_seconds"] = rig.seconds(lambda e=engine, items=asked: rigs.fill(e, items))
            cell["times_faster"] = cell["separate_seconds"] / cell["forks_seconds"]
        cells[str(length)] = cell
    return cells


def growth(rig: Rig, limits: Cells) -> Cells:
    """Prefill, KV bytes and a decode step against length."""
    lengths = [32, 64, 128, 256] if rig.small else [2**power for power in range(10, 18)]
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


def authors(rig: Rig, limits: Cells) -> Cells:
    """``generate`` on one prompt with the authors' module around two FFNs, beside the engine with banks that act. The
    environment variable ``RELEASED`` names a checkout of their released code."""
    length = 300 if rig.small else 32_768
    prompt = rig.ids(length, 2)
    with rig.engine(length, **rigs.MODES["acting"]) as engine:
        run(engine, request("warm", rig.ids(length, 1), 1))
        cells: Cells = {"tokens": length, "engine": rig.seconds(lambda: run(engine, request("x", prompt, 1)))}
        layers = engine.config.pa_layers or ()
    with rig.authors(Path(os.environ["RELEASED"]), layers) as module:
        cells["generate_authors"] = rigs.generate_seconds(rig, module, prompt, 1)
    with rig.peer() as module:
        cells["generate"] = rigs.generate_seconds(rig, module, prompt, 1)
    return cells
