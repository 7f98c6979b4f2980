"""The engine beside transformers: ``python load_tests/engine_bench.py``.

Eight requests with prompts of ``--prompt`` tokens and ``--new`` greedy tokens each, through the engine (PA off and on),
through transformers' ``generate`` one by one and through its continuous batching, in turn and ``--rounds`` times. CPU
seconds are those of the process. The engine's decode step is the median of its steps that only decode, all requests
at once; the peers' is what ``--new`` tokens more cost, divided by their number. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine
from pacellm.model.load import load
from pacellm.types import Delta, Event, GenerationRequest, SamplingParams

Answers = list[list[int]]
Peer = Callable[[Answers, int], Answers]


def engine_peer(path: Path, pa: bool, decode_steps: list[float]) -> Peer:
    """Our engine, everything at once; seconds of steps that only decode are added to ``decode_steps``."""
    engine, runs = Engine(load(path), EngineConfig(kv_cache_memory=2**30, pa=pa)), itertools.count()

    def step() -> list[tuple[str, Event]]:
        running = engine.scheduler.running
        only_decodes = len(running) > 1 and all(sequence.is_decoding for sequence in running)
        started = time.perf_counter()
        events = engine.step()
        if only_decodes:
            decode_steps.append(time.perf_counter() - started)
        return events

    def run(prompts: Answers, new: int) -> Answers:
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        tenant = f"run {next(runs)}"  # nothing is reused across tenants, so every run reads its prompts anew
        for number, prompt in enumerate(prompts):
            engine.add(GenerationRequest(str(number), prompt, sampling, tenant=tenant))
        events: dict[str, list[Event]] = {}
        while engine.has_work:
            for name, event in step():
                events.setdefault(name, []).append(event)
        return [
            [token for event in events[str(number)] if isinstance(event, Delta) for token in event.token_ids]
            for number in range(len(prompts))
        ]

    return run


def generate_peer(path: Path) -> Peer:
    """transformers' ``generate``, one request after another."""
    model = AutoModelForCausalLM.from_pretrained(path)

    def run(prompts: Answers, new: int) -> Answers:
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
            )
            answers.append(found[0, len(prompt) :].tolist())
        return answers

    return run


def continuous_peer(path: Path) -> Peer:
    """transformers' continuous batching, everything at once."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")

    def run(prompts: Answers, new: int) -> Answers:
        found = model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=sum(len(prompt) + new for prompt in prompts) // 256 + 2 * len(prompts), max_batch_tokens=1024
            ),
        )
        # results come in the order in which they ended
        ordered = sorted(found.values(), key=lambda output: prompts.index(list(output.prompt_ids)))
        return [list(output.generated_tokens) for output in ordered]

    return run


def _row(rows: dict[str, dict[str, list[float]]], name: str) -> dict[str, list[float]]:
    return rows.setdefault(name, {"wall": [], "cpu": [], "step": [], "decode": []})


def measure(peer: Peer, prompts: Answers, new: int) -> tuple[float, float, Answers]:
    """(wall seconds, CPU seconds, answers)."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = peer(prompts, new)
    return time.perf_counter() - wall, time.process_time() - cpu, answers


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(6, 2000, (args.requests, args.prompt), generator=generator).tolist()
    rows: dict[str, dict[str, list[float]]] = {}
    peers = {
        "engine, PA off": engine_peer(args.model, False, _row(rows, "engine, PA off")["decode"]),
        "engine, PA on": engine_peer(args.model, True, _row(rows, "engine, PA on")["decode"]),
        "generate": generate_peer(args.model),
        "continuous batching": continuous_peer(args.model),
    }
    answers: dict[str, Answers] = {}
    for peer in peers.values():
        peer(prompts, 2)  # warm up
    for _ in range(args.rounds):
        for name, peer in peers.items():
            short_wall, _, _ = measure(peer, prompts, 1)
            wall, cpu, answers[name] = measure(peer, prompts, 1 + args.new)
            row = _row(rows, name)
            row["wall"].append(wall)
            row["cpu"].append(cpu)
            row["step"].append((wall - short_wall) / args.new)
    tokens = args.requests * (args.prompt + args.new + 1)
    table = {
        name: {
            "tokens_per_cpu_second": round(tokens / statistics.median(found["cpu"]), 1),
            "wall_seconds": round(statistics.median(found["wall"]), 3),
            "decode_step_ms": round(1e3 * statistics.median(found["decode"] or found["step"]), 2),
            "same_answers_as_generate": sum(
                mine == theirs for mine, theirs in zip(answers[name], answers["generate"], strict=True)
            ),
        }
        for name, found in rows.items()
    }
    for name, row in table.items():
        print(f"{name:20}", *(f"{key} {value}" for key, value in row.items()), sep="  ")
    print(json.dumps({
        "bench": "engine", "requests": args.requests, "prompt": args.prompt, "new": args.new, "rounds": args.rounds,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peers": table,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
