"""What weights of fewer bits bring on a CPU: ``python load_tests/narrow_bench.py MODEL``.

torch's weight-only products (int8 with a scale per row, int4 in groups of ``--group`` inputs, asymmetric, as
``torch._weight_int8pack_mm`` and ``torch._weight_int4pack_mm_for_cpu`` want them, on bfloat16 rows: with float32 rows
both fall back to loops that are 12 to 50 times as slow) and bfloat16, beside float32 by torch and by the kernel that
the engine takes (``pacellm.model.linear``). Timed are all the model's linear layers one after the other, the head
among them, on ``--rows`` rows, kernels in turn; the perplexity is that of the calibration text in transformers with
every layer's product replaced. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm.calibration.file import text
from pacellm.model.linear import OneDNN

Product = Callable[[Tensor], Tensor]


def plain(layer: nn.Linear, group: int) -> tuple[Product, int]:
    """float32 by torch. All of these: (the product, bytes that it reads of weights)."""
    return lambda rows: nn.functional.linear(rows, layer.weight, layer.bias), layer.weight.nbytes


def packed(layer: nn.Linear, group: int) -> tuple[Product, int]:
    """float32 by oneDNN over weights in its own order, as the engine computes it."""
    return OneDNN(layer, packs=True), layer.weight.nbytes


def half(layer: nn.Linear, group: int) -> tuple[Product, int]:
    """bfloat16 weights and rows."""
    weight = layer.weight.to(torch.bfloat16)
    return lambda rows: nn.functional.linear(rows.to(weight.dtype), weight).to(rows.dtype), weight.nbytes


def int8(layer: nn.Linear, group: int) -> tuple[Product, int]:
    """int8 weights with a scale per output."""
    scales = layer.weight.abs().amax(1) / 127
    weight, scales = (layer.weight / scales[:, None]).round().to(torch.int8), scales.to(torch.bfloat16)
    return lambda rows: torch._weight_int8pack_mm(rows.to(scales.dtype), weight, scales).to(rows.dtype), weight.nbytes


def int4(layer: nn.Linear, group: int) -> tuple[Product, int]:
    """int4 weights with a scale and a middle per group."""
    grouped = layer.weight.unflatten(1, (-1, group))
    low, high = grouped.amin(2), grouped.amax(2)
    scales = ((high - low) / 15).clamp(min=1e-8)
    codes = ((grouped - low[..., None]) / scales[..., None]).round().clamp(0, 15).to(torch.int32).flatten(1)
    weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    middles = low + 8 * scales
    both = torch.stack([scales, middles], 2).transpose(0, 1).contiguous().to(torch.bfloat16)

    def product(rows: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(rows.to(both.dtype), weight, group, both).to(rows.dtype)

    return product, weight.nbytes + both.nbytes


KERNELS = {"float32": plain, "float32, as the engine": packed, "bfloat16": half, "int8": int8, "int4": int4}


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Of a text in one pass."""
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return math.exp(float(nn.functional.cross_entropy(logits, ids[1:])))


def with_products(layers: list[nn.Linear], products: list[Product], found: Callable[[], float]) -> float:
    """What ``found`` gives where layers compute by these products."""
    for layer, product in zip(layers, products, strict=True):
        layer.forward = lambda hidden, of=product: of(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])
    try:
        return found()
    finally:
        for layer in layers:
            del layer.forward


def timed(
    layers: list[nn.Linear], products: dict[str, list[Product]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of all layers on ``count`` rows, by kernel, in turn; the first round is not counted."""
    inputs = {layer.in_features: torch.randn(count, layer.in_features) for layer in layers}
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for number in range(rounds + 1):
        for name, mine in products.items():
            started = time.perf_counter()
            for layer, product in zip(layers, mine, strict=True):
                product(inputs[layer.in_features])
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", type=Path)
    add("--rows", type=int, nargs="+", default=[1, 4, 16])
    add("--group", type=int, default=32, help="inputs that share a scale of int4")
    add("--rounds", type=int, default=15)
    add("--tokens", type=int, default=2048, help="of the text that perplexity is of")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if any(layer.bias is not None for layer in layers):
        parser.error("a model without biases is needed: torch's narrow products have none")
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text())["input_ids"][: args.tokens])
    products: dict[str, list[Product]] = {}
    rows: dict[str, dict[str, object]] = {}
    for name, kernel in KERNELS.items():
        made = [kernel(layer, args.group) for layer in layers]
        products[name] = [product for product, _ in made]
        found = with_products(layers, products[name], lambda: perplexity(model, ids))
        rows[name] = {"kernel": name, "MB": round(sum(size for _, size in made) / 1e6), "perplexity": round(found, 3)}
        print(rows[name], file=sys.stderr, flush=True)
    for count in args.rows:
        seconds = timed(layers, products, count, args.rounds)
        for name, mine in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(mine, seconds["float32"], strict=True))
            rows[name][f"ms, {count} rows"] = round(1e3 * statistics.median(mine), 2)
            rows[name][f"to float32, {count} rows"] = round(ratio, 3)
    for row in rows.values():
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps({
        "bench": "narrow", "model": args.model.name, "group": args.group, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "rows": list(rows.values()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
