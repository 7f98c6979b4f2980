"""What observing costs: ``python load_tests/observe_bench.py MODEL``.

Two engines of one process and one model in memory (where weights lie moves a step by up to 3 %), one whose requests
have PA off and one with observed banks, do the same work step by step in turn, so that whatever else the machine does
meets both. A prefill is ``--prompt`` tokens of text in steps of ``--budget``; then ``--new`` tokens are decoded for
``--batch`` requests at once. Each round gives a ratio of sums (prefill) and a median of ratios of steps (decode), of
CPU seconds and of wall seconds. What is printed is the median over rounds with its 95 % interval by bootstrap, and
whether tokens and log-probabilities were equal to the bit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine
from pacellm.engine.pace import Pace
from pacellm.model.load import load
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Delta, Event, Failed, GenerationRequest, PAChoice, SamplingParams

TEXT = ("README.md", "docs/sessions.md", "docs/api.md", "docs/lab.md")


class Side:
    """One engine and the PA mode of its requests: seconds of its steps as (CPU, wall), and what it answered."""

    def __init__(self, engine: Engine, pa: PAChoice) -> None:
        self.engine, self.pa = engine, pa
        self.forget()

    def forget(self) -> None:
        """Begin a round."""
        self.prefill: list[tuple[float, float]] = []
        self.decode: list[tuple[float, float]] = []
        self.events: list[Event] = []

    def step(self) -> None:
        """One step, timed."""
        decodes = all(sequence.is_decoding for sequence in self.engine.scheduler.running)
        decodes = decodes and bool(self.engine.scheduler.running)
        self.engine.scheduler.pace = Pace()  # chunks by the budget alone, the same on both sides
        cpu, wall = time.process_time(), time.perf_counter()
        found = self.engine.step()
        seconds = time.process_time() - cpu, time.perf_counter() - wall
        (self.decode if decodes else self.prefill).append(seconds)
        self.events += [event for _, event in found]

    def answers(self) -> list[tuple[int, float]]:
        """Tokens and log-probabilities in order."""
        for event in self.events:
            if isinstance(event, Failed):
                raise event.error
        scores = [score for event in self.events if isinstance(event, Delta) for score in event.logprobs]
        return [(score.token_id, score.logprob) for score in scores]


def one_round(sides: list[Side], prompts: list[list[int]], new: int, name: str) -> dict[str, float]:
    """Ratios of the second side to the first, and 1.0 under ``same`` where answers are equal to the bit."""
    sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, logprobs=1)
    for side in sides:
        side.forget()
        for number, prompt in enumerate(prompts):
            side.engine.add(GenerationRequest(f"{number}", prompt, sampling, tenant=name, pa=side.pa))
    order = list(sides)
    while any(side.engine.has_work for side in sides):
        order.reverse()  # none is always first
        for side in order:
            if side.engine.has_work:
                side.step()
    plain, observed = sides
    found: dict[str, float] = {"same": float(plain.answers() == observed.answers())}
    for clock, what in enumerate(("cpu", "wall")):
        sums = [sum(seconds[clock] for seconds in side.prefill) for side in sides]
        found[f"prefill {what}"] = sums[1] / sums[0]
        pairs = zip(plain.decode, observed.decode, strict=True)
        found[f"decode {what}"] = statistics.median(mine[clock] / base[clock] for base, mine in pairs)
        found[f"prefill ms {what}"] = 1e3 * sums[0]
        found[f"decode ms {what}"] = 1e3 * statistics.median(seconds[clock] for seconds in plain.decode)
    return found


def interval(values: list[float]) -> list[float]:
    """The median, and the 2.5th and 97.5th percentile of bootstrapped medians."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(2000))
    return [round(number, 4) for number in (statistics.median(values), medians[50], medians[-51])]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL_PATH)
    parser.add_argument("--prompt", type=int, default=1536)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    root = Path(__file__).parent.parent
    ids = ChatTokenizer(args.model).encode("\n".join((root / name).read_text() for name in TEXT))
    assert len(ids) >= 37 * args.batch + args.prompt, "the text is shorter"
    prompts = [ids[37 * number : 37 * number + args.prompt] for number in range(args.batch)]
    settings = {"kv_cache_memory": 2**29, "max_num_batched_tokens": args.budget, "max_num_mixed_tokens": args.budget}
    model, modes = load(args.model), ("off", "observe")
    sides = [Side(Engine(model, EngineConfig(**settings)), pa) for pa in modes]  # type: ignore[arg-type]
    rounds = [one_round(sides, prompts, args.new, str(number)) for number in range(args.rounds + 1)][1:]
    result = {name: interval([found[name] for found in rounds]) for name in rounds[0]}
    for name, (middle, low, high) in result.items():
        print(f"{name:16} {middle:10.4f}  [{low:.4f}, {high:.4f}]")
    print(json.dumps({
        "bench": "observe", "model": args.model.name, "layers": sides[1].engine.config.pa_layers, "prompt": args.prompt,
        "budget": args.budget, "new": args.new, "batch": args.batch, "rounds": args.rounds,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "result": result,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
