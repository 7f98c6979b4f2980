"""Which kernel attends prompts' chunks on CUDA: each is tried out against a plain computation, the right ones are
timed, and the fastest is used."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pacellm.config import ATTENTION_KERNELS
from pacellm.errors import ConfigError
from pacellm.model.attention import prefill
from pacellm.model.attention.plan import PrefillKernel
from pacellm.model.attention.prefill import new_plan
from pacellm.model.context import Chunk, KVShape, Run

#: a layer's query heads, and ((kv heads, key size), (kv heads, value size))
Shape = tuple[int, KVShape]
NAMES = ATTENTION_KERNELS[1:]
QUERIES, BEHIND = 2048, 32_768
TOLERANCE = 0.03


@dataclass
class Trial:
    """What became of the kernels.

    Attributes:
        kernel: the one to use.
        seconds: by name, of one pass of ``QUERIES`` queries behind ``BEHIND`` keys through all layers' attention; empty
            where only one was tried.
        refused: by name, why it is not used.
    """

    kernel: PrefillKernel
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@torch.inference_mode()
def choose(wanted: str, shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> Trial:
    """The kernel that is asked for, or with ``auto`` the fastest right one on these layers.

    Raises:
        ConfigError: none, or not the one that is asked for, can be used.
    """
    refused: dict[str, str] = {}
    right: dict[str, PrefillKernel] = {}
    for name in NAMES if wanted == "auto" else (wanted,):
        kernel = _tried(name, shapes, dtype, device, refused)
        if kernel is not None:
            right[name] = kernel
    if not right:
        told = "; ".join(f"{name}: {problem}" for name, problem in refused.items())
        raise ConfigError(f"attention_kernel {wanted} cannot be used here: {told}", param="attention_kernel")
    if wanted != "auto":
        return Trial(right[wanted])
    seconds = _timed(right, shapes, dtype, device, refused)
    fastest = min(seconds, key=seconds.__getitem__, default=next(iter(right)))
    return Trial(right[fastest], seconds, refused)


def _tried(
    name: str, shapes: list[Shape], dtype: torch.dtype, device: torch.device, refused: dict[str, str]
) -> PrefillKernel | None:
    """The kernel where it is right; where not, why goes to ``refused``."""
    try:
        kernel = prefill.load(name)
        errors = [error(kernel, shape, dtype, device) for shape in set(shapes)]
    except Exception as problem:
        refused[name] = reason(problem)
        return None
    wrong = [found for found in errors if not found <= TOLERANCE]  # also what is not a number
    if wrong:
        refused[name] = f"it is off by {wrong[0]:.2g}"
    return None if wrong else kernel


def _timed(
    kernels: dict[str, PrefillKernel],
    shapes: list[Shape],
    dtype: torch.dtype,
    device: torch.device,
    refused: dict[str, str],
) -> dict[str, float]:
    """Seconds of all layers, by name."""
    seconds = {}
    for name, kernel in kernels.items():
        try:
            each = [count * seconds_of(kernel, shape, dtype, device) for shape, count in Counter(shapes).items()]
        except Exception as problem:
            refused[name] = reason(problem)
        else:
            seconds[name] = sum(each)
    return seconds


def reason(problem: Exception) -> str:
    """An exception in one line."""
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0][:200]}" if text else type(problem).__name__


def error(kernel: PrefillKernel, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of outputs and log-sum-exps on random numbers; not a number where any is none.

    Two chunks of 1,100 and 1,030 queries, one behind 3,200 keys and one behind none; the same over keys that all of
    them see; and with a window, where the kernel has that. The numbers are a little more than cuDNN's calls are cut to.
    """
    unit = prefill.CUDNN_STEP
    first, second, before = unit + unit // 14, unit + 6, 3 * unit + unit // 8
    query, keys, values = _random(shape, first + second, 6 * unit, dtype, device)
    scale = query.shape[2] ** -0.5
    chunks = (Chunk(0, first, before, ()), Chunk(first, first + second, 0, ()))
    cases: list[tuple[bool, int | None, tuple[Run, Run]]] = [
        (True, None, (Run(0, unit, before + first), Run(0, 6 * unit - second, second))),
        (False, None, (Run(0, unit, 3 * unit), Run(0, unit // 2, unit + unit // 4))),
    ]
    if kernel.windows:
        cases.append((True, unit // 3, cases[0][2]))
    worst = [torch.zeros((), device=device)]
    for causal, window, runs in cases:
        plan = new_plan(list(zip(chunks, runs, strict=True)), causal, device)
        output, lse = kernel.call(query, keys, values, plan, scale, window)
        for part in plan.parts:
            rows, slots = slice(part.first, part.first + part.count), slice(part.slot, part.slot + part.length)
            expected = _plain(query[rows], keys[slots], values[slots], causal, scale, window)
            for found, right in zip((output[rows], lse[rows]), expected, strict=True):
                worst.append((found.float() - right).abs().max())
    return float(torch.stack(worst).max())  # which keeps what is not a number, as Python's max would not


def seconds_of(
    kernel: PrefillKernel,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    queries: int = QUERIES,
    behind: int = BEHIND,
    repeats: int = 5,
) -> float:
    """Median seconds of one layer's attention of a chunk of ``queries`` tokens behind ``behind`` others."""
    query, keys, values = _random(shape, queries, behind + queries, dtype, device)
    chunk = Chunk(0, queries, behind, ())
    plan = new_plan([(chunk, Run(0, 0, behind + queries))], True, device)

    def once() -> float:
        _wait(device)
        started = time.perf_counter()
        kernel.call(query, keys, values, plan, query.shape[2] ** -0.5, None)
        _wait(device)
        return time.perf_counter() - started

    once()  # compiles what it needs
    return statistics.median(once() for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random(
    shape: Shape, queries: int, slots: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n, H, D] and a slab as layers have it: keys and values [slots, Hkv, D], head by head in memory."""
    heads, ((kv_heads, size), (_, width)) = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    keys, values = random(kv_heads, slots, size), random(kv_heads, slots, width)
    return random(queries, heads, size), keys.transpose(0, 1), values.transpose(0, 1)


def _plain(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """([n, H, D], log-sum-exp [n, H]) in float32, all at once; a KV head at a time, since scores are large."""
    count, length = len(query), len(keys)
    positions = torch.arange(length, device=query.device)
    distance = positions[length - count :, None] - positions
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden = (distance < 0) | (distance >= (window or length))
    outputs, totals = [], []
    for group, key, value in zip(query.float().chunk(keys.shape[1], 1), keys.unbind(1), values.unbind(1), strict=True):
        scores = torch.einsum("nhd,kd->hnk", group, key.float()) * scale
        scores.masked_fill_(hidden, -torch.inf)
        outputs.append(scores.softmax(-1) @ value.float())
        totals.append(scores.logsumexp(-1))
    return torch.cat(outputs).transpose(0, 1), torch.cat(totals).transpose(0, 1)
