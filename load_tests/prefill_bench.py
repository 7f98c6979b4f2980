"""What reading costs by length: ``python load_tests/prefill_bench.py --out prefill``.

Every length is read by an engine in a process of its own. ``attention_share`` is the time that the full-attention
layers' arithmetic takes at the rate measured here for the attention kernel alone, over the whole time; with PA off the
last layer attends only what the head reads, and is not counted.
Seconds are fitted as a + b·n + c·n²; with matplotlib installed, ``OUT.png`` draws them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine, run_until_idle
from pacellm.model.attention import cpu as attention_cpu
from pacellm.model.load import load
from pacellm.types import GenerationRequest, SamplingParams

ROOM = 2**18


def kernel_rate() -> float:
    """Floating-point operations a second of the attention kernel on whole tiles against a full window, median of 9."""
    heads, size = 6, 32
    query = torch.randn(1, heads, attention_cpu.TILE, size)
    key, value = (torch.randn(1, heads, attention_cpu.WINDOW, size) for _ in range(2))
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        seconds.append(time.perf_counter() - started)
    return 4 * heads * attention_cpu.TILE * attention_cpu.WINDOW * size / statistics.median(seconds)


def one(length: int, pa: bool) -> dict[str, Any]:
    """Read ``length`` random tokens, in this process."""
    model = load(MODEL_PATH)
    config = EngineConfig(pa=pa, kv_cache_memory=(ROOM + 512) * model.bytes_per_token)
    engine = Engine(model, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.randint(6, 2000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    rate = kernel_rate()
    engine.add(GenerationRequest("one", ids, SamplingParams(max_tokens=0)))
    wall, cpu = time.perf_counter(), time.process_time()
    run_until_idle(engine)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    config_ = model.module.config
    kinds = config_.layer_types[: None if pa else -1]  # type: ignore[union-attr,index]
    full = sum(kind == "full_attention" for kind in kinds)
    work = full * 2 * length * (length + 1) * config_.hidden_size  # type: ignore[union-attr,operator]
    return {
        "tokens": length,
        "pa": "on" if pa else "off",
        "seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "tokens_per_second": round(length / wall),
        "attention_share": round(work / rate / wall, 3),
        "kernel_gflops": round(rate / 1e9, 1),
        "start_mib": before // 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "kv_mib": length * model.bytes_per_token // 2**20,
    }


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative least squares of seconds, and of peak memory in length."""
    lengths = np.array([row["tokens"] for row in rows], dtype=float)
    seconds = np.array([row["seconds"] for row in rows])
    terms = np.stack([np.ones_like(lengths), lengths, lengths**2], axis=1)
    found = np.linalg.lstsq(terms / seconds[:, None], np.ones_like(seconds), rcond=None)[0]
    memory = np.array([row["peak_mib"] for row in rows], dtype=float)
    slope, start = np.polyfit(lengths, memory, 1)
    spread = 1 - ((memory - slope * lengths - start) ** 2).sum() / ((memory - memory.mean()) ** 2).sum()
    return {
        "seconds": [float(term) for term in found],
        "worst_relative_error": float(np.abs(terms @ found / seconds - 1).max()),
        "memory_bytes_per_token": float(slope * 2**20),
        "memory_start_mib": float(start),
        "memory_r2": float(spread),
    }


def draw(rows: list[dict[str, Any]], fitted: dict[str, Any], path: Path) -> None:
    """Seconds and memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lengths = np.array([row["tokens"] for row in rows], dtype=float)
    smooth = np.geomspace(lengths.min(), lengths.max(), 200)
    start, linear, square = fitted["seconds"]
    left.loglog(lengths, [row["seconds"] for row in rows], "o", label="measured")
    left.loglog(smooth, start + linear * smooth + square * smooth**2, label="a + b·n + c·n²")
    left.loglog(smooth, square * smooth**2, ":", label="c·n²: attention")
    left.set(xlabel="tokens", ylabel="seconds", title="Reading a document")
    left.legend()
    right.plot(lengths / 1024, [row["peak_mib"] / 1024 for row in rows], "o-", label="peak resident memory")
    right.plot(lengths / 1024, [row["kv_mib"] / 1024 for row in rows], ":", label="of it KV")
    right.set(xlabel="thousand tokens (1,024)", ylabel="GiB", title="Memory", ylim=0)
    right.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2**n for n in (10, 12, 14, 16, 17)] + [200_000, 262_143]
    )
    parser.add_argument("--pa", choices=("on", "off"), default="on")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("prefill"), help="path of the picture, without ending")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.pa == "on")))
        return
    rows = []
    for length in args.lengths:
        command = [sys.executable, __file__, "--pa", args.pa, "--one", str(length)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1], flush=True)
    fitted = fit(rows)
    try:
        draw(rows, fitted, args.out.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no picture")
    print(
        json.dumps(
            {
                "bench": "prefill",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "rows": rows,
                "fit": fitted,
            }
        )
    )


if __name__ == "__main__":
    main()
