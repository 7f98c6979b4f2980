"""Decoding and reading on a CPU beside ``generate``, in pairs: ``python load_tests/decode_bench.py MODEL``.

Pairs stand next to each other in one process, so that whatever else the machine does falls on both: ``generate`` runs,
and between two of its tokens the engine makes a step on the same prompts. Prompts are read likewise, in turn. Numbers
are medians, ratios those of the pairs (ours to theirs), with 95 % bootstrap intervals. The floor is what a step must
read at the rate at which the machine reads memory here. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteriaList

from pacellm.config import EngineConfig
from pacellm.engine.engine import Engine
from pacellm.model.load import load
from pacellm.types import Delta, Event, Failed, GenerationRequest, SamplingParams

Pairs = list[tuple[float, float]]
_WARM = 4  # tokens that are not counted


class Pairer:
    """Makes ``generate`` and an engine answer the same prompts.

    Args:
        engine: ours. peer: the same checkpoint in transformers.
    """

    def __init__(self, engine: Engine, peer: Any) -> None:
        self.engine, self.peer, self._runs = engine, peer, 0
        self.tokens: dict[str, list[int]] = {}

    def add(self, prompts: Tensor, new: int) -> None:
        """Queue requests; nothing is reused across runs."""
        self._runs += 1
        self.tokens = {str(number): [] for number in range(len(prompts))}
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        for number, prompt in enumerate(prompts.tolist()):
            self.engine.add(GenerationRequest(str(number), prompt, sampling, tenant=f"run {self._runs}"))

    def step(self) -> float:
        """Seconds of a step of the engine."""
        started = time.perf_counter()
        events = self.engine.step()
        seconds = time.perf_counter() - started
        self._take(events)
        return seconds

    def _take(self, events: list[tuple[str, Event]]) -> None:
        for name, event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta):
                self.tokens[name] += event.token_ids

    def generate(self, prompts: Tensor, new: int, criteria: StoppingCriteriaList | None = None) -> list[list[int]]:
        """The peer's answers."""
        found = self.peer.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0, stopping_criteria=criteria,
        )  # fmt: skip
        return found[:, prompts.shape[1] :].tolist()  # type: ignore[no-any-return]

    def decode(self, prompts: Tensor, new: int) -> tuple[Pairs, int]:
        """(seconds of a step of each, answers that are the same)."""
        self.add(prompts, new + 1)
        while any(not tokens for tokens in self.tokens.values()):
            self.step()
        pairs: Pairs = []
        ended: list[float] = []

        def between(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            now = time.perf_counter()
            if ended and self.engine.has_work:
                pairs.append((self.step(), now - ended[-1]))
            ended.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        answers = self.generate(prompts, new, StoppingCriteriaList([between]))
        while self.engine.has_work:
            self.step()
        same = sum(mine[:new] == theirs for mine, theirs in zip(self.tokens.values(), answers, strict=True))
        return pairs[_WARM:], same

    def read(self, prompts: Tensor, rounds: int) -> Pairs:
        """Seconds of reading prompts and giving each its first token; who goes first changes."""
        pairs: Pairs = []
        for number in range(rounds):
            found = {}
            for ours in (True, False) if number % 2 else (False, True):
                started = time.perf_counter()
                if ours:
                    self.add(prompts, 1)
                    while self.engine.has_work:
                        self._take(self.engine.step())
                else:
                    self.generate(prompts, 1)
                found[ours] = time.perf_counter() - started
            pairs.append((found[True], found[False]))
        return pairs


def row_of(pairs: Pairs) -> dict[str, Any]:
    """Medians in ms, and the pairs' ratio with its interval."""
    ratios = [mine / theirs for mine, theirs in pairs]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "ours_ms": round(1e3 * statistics.median(mine for mine, _ in pairs), 1),
        "generate_ms": round(1e3 * statistics.median(theirs for _, theirs in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "interval": [round(medians[25], 3), round(medians[975], 3)],
        "pairs": len(pairs),
    }


def read_rate(rounds: int = 9) -> float:
    """Bytes a second at which this process's threads read memory."""
    data, seconds = torch.ones(2**28), []
    for _ in range(rounds):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / min(seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", type=Path)
    add("--batches", type=int, nargs="+", default=[1, 4, 16])
    add("--prompt", type=int, default=128, help="tokens in front of what is decoded")
    add("--new", type=int, default=64, help="tokens decoded in a round")
    add("--lengths", type=int, nargs="+", default=[512, 2048], help="of prompts that are read")
    add("--rounds", type=int, default=3)
    add("--dtype", default="float32")
    add("--pa", action="store_true", help="with Persistent Activity (default: off)")
    add("--exact-products", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    model = load(args.model, dtype=args.dtype)
    config = EngineConfig(kv_cache_memory=2**30, pa=args.pa, exact_products=args.exact_products)
    engine = Engine(model, config)
    pairer = Pairer(engine, AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype))
    weights = sum(weight.nbytes for weight in model.module.parameters())  # an embedding that is no head counts too
    rate = read_rate()
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []

    def prompts(count: int, length: int) -> Tensor:
        return torch.randint(6, min(2000, model.vocab_size), (count, length), generator=generator)

    pairer.decode(prompts(1, 16), 8)  # warm up
    for batch in args.batches:
        pairs, same = [], 0
        for _ in range(args.rounds):
            found, equal = pairer.decode(prompts(batch, args.prompt), args.new)
            pairs, same = pairs + found, same + equal
        rows.append({"what": f"decode, batch {batch}", **row_of(pairs), "same": f"{same}/{batch * args.rounds}"})
        print(rows[-1], file=sys.stderr, flush=True)
    for length in args.lengths:
        pairer.read(prompts(1, length), 1)
        rows.append({"what": f"read {length} tokens", **row_of(pairer.read(prompts(1, length), 3 * args.rounds))})
        print(rows[-1], file=sys.stderr, flush=True)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps({
        "bench": "decode", "model": args.model.name, "dtype": args.dtype, "threads": torch.get_num_threads(),
        "products": vars(engine.products), "weights": weights, "read_gb_per_s": round(rate / 1e9, 1),
        "floor_ms": round(1e3 * weights / rate, 1), "torch": torch.__version__,
        "transformers": transformers.__version__, "rows": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
