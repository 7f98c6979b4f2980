"""What working sets of experts cost and bring: ``python load_tests/experts_bench.py --part recall`` (or others).

``recall``: documents of the bundled model's task, read with all experts and asked about with parts of them, for layouts
by weights, by activations (on a document that is not asked about) and in random order.
``speed``: decode steps at Qwen2.5-0.5B's sizes with random weights and a random layout, densities in turn, beside each
cell's own ceiling: the bytes of all weights over those that the step's sets leave; with ``--model`` at that model's.
``perplexity``: of a checkpoint (``--model``) on texts (``--text``), ``--scored`` tokens behind every ``--length``
scored as if they had been decoded, over that of density 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.demo.probe import Probe
from pacellm.demo.reader import ask, prompt_of, questions_of, read
from pacellm.demo.shares import interval
from pacellm.engine.engine import Engine
from pacellm.experts.activity import activation_features
from pacellm.experts.apply import apply_layout, model_fingerprint, weight_features
from pacellm.experts.cluster import Features, cluster, shuffled
from pacellm.experts.layout import LayerLayout, Layout
from pacellm.llm import LLM
from pacellm.model.load import LoadedModel, load, prepare
from pacellm.model.neurons import ffns
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Failed, GenerationRequest, SamplingParams

CALIBRATION_SEED = 10_000
Make = Callable[[Features, int, int], LayerLayout]


def laid_out(model: LoadedModel, features: dict[int, Features], make: Make, experts: int, seed: int) -> LoadedModel:
    """The model with a layout of its own on it."""
    layers = {layer: make(one, experts, seed) for layer, one in features.items()}
    return apply_layout(model, Layout(layers, "bench", "none", seed, model_fingerprint(model.module), {}))


def recall(args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of right answers by layout, PA and density."""
    tokenizer = ChatTokenizer(MODEL_PATH)
    rows = []
    for name in ("weights", "activations", "random"):
        model = load(MODEL_PATH)
        if name == "activations":
            sample = make_document(args.calibration, args.calibration // 256, CALIBRATION_SEED, tokenizer.backend)
            features = activation_features(model, prompt_of(tokenizer, sample, "Who?"), seed=0)
            model = load(MODEL_PATH)
        else:
            features = weight_features(model.module)
        model = laid_out(model, features, shuffled if name == "random" else cluster, args.experts, args.seed)
        llm = LLM(model, tokenizer=tokenizer, kv_cache_memory=2**30)
        right = {(pa, density): 0 for pa in ("off", "on") for density in args.densities}
        asked = 0
        for seed in range(args.documents):
            document = make_document(args.length, max(args.needles, args.length // 256), seed, tokenizer.backend)
            facts = questions_of(document, args.needles, 0)
            asked += len(facts)
            for pa, density in right:
                session = f"{pa} {seed}"
                if density == args.densities[0]:
                    read(llm, document, session, pa)
                right[pa, density] += sum(
                    ask(llm, document, fact.question, session, pa, density).text == fact.answer for fact in facts
                )
            print(f"{name}: document {seed + 1} of {args.documents}", file=sys.stderr, flush=True)
        for (pa, density), count in right.items():
            low, high = interval(count, asked)
            rows.append({"layout": name, "pa": pa, "density": density, "right": count, "asked": asked,
                         "low": round(low, 3), "high": round(high, 3)})  # fmt: skip
    return rows


def perplexity(args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of perplexity by layout and density; ratios with 95 % bootstrap intervals over the windows."""
    tokenizer = ChatTokenizer(args.model)
    ids = tokenizer.encode("\n\n".join(path.read_text() for path in args.text))
    size = args.length + args.scored
    windows = [ids[start : start + size] for start in range(0, len(ids) - size, size)][: args.documents]
    rng, rows = random.Random(0), []
    for name in args.layouts:
        model = load(args.model)
        if name == "activations":
            features = activation_features(model, ids[-args.calibration :], seed=0)
            model = load(args.model)
        else:
            features = weight_features(model.module)
        model = laid_out(model, features, shuffled if name == "random" else cluster, args.experts, args.seed)
        engine = Engine(model, EngineConfig(kv_cache_memory=2**30, pa=False))
        probe = Probe(engine)
        losses: dict[float, list[float]] = {}
        for number, window in enumerate(windows):
            prompt, answer = window[: args.length], window[args.length :]
            for density in args.densities:
                logprobs = probe.logprobs(prompt, answer, "text", pa="off", density=density)
                loss = -logprobs.gather(1, torch.tensor(answer)[:, None]).mean()
                losses.setdefault(density, []).append(float(loss))
            print(f"{name}: window {number + 1} of {len(windows)}", file=sys.stderr, flush=True)
        base = losses[args.densities[0]]
        for density, found in losses.items():
            gaps = [one - other for one, other in zip(found, base, strict=True)]
            means = sorted(statistics.fmean(rng.choices(gaps, k=len(gaps))) for _ in range(1000))
            rows.append({"layout": name, "density": density, "windows": len(windows),
                         "perplexity": round(math.exp(statistics.fmean(found)), 2),
                         "ratio": round(math.exp(statistics.fmean(gaps)), 3),
                         "interval": [round(math.exp(means[25]), 3), round(math.exp(means[975]), 3)]})  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def speed(args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of decode steps by batch and density; ratios are medians of pairs of runs next to each other."""
    torch.manual_seed(args.seed)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.no_grad():
        model = prepare(Qwen2ForCausalLM(config)) if args.model is None else load(args.model)
        model = laid_out(model, weight_features(model.module), shuffled, args.experts, args.seed)
    engine = Engine(model, EngineConfig(kv_cache_memory=2**30, pa=False, max_num_seqs=8))
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    each = sum(axis.view.nbytes for ffn in ffns(model.module) if ffn is not None for axis in ffn.axes())
    each /= model.num_layers
    rows = []
    for batch in args.batches:
        times: dict[float, list[float]] = {density: [] for density in args.densities}
        parts: dict[float, float] = {}
        for number in range(args.rounds):
            for density in args.densities:
                step, parts[density] = _decode(engine, batch, density, args, number)
                times[density].append(step)
        base = args.densities[0]
        for density in args.densities:
            ratio = statistics.median(a / b for a, b in zip(times[base], times[density], strict=True))
            saved = each * (engine.model.num_layers - parts[density])
            step = statistics.median(times[density])
            rows.append({"batch": batch, "density": density, "step_ms": round(1e3 * step, 1), "ratio": round(ratio, 3),
                         "ceiling": round(weights / (weights - saved), 3)})  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _decode(engine: Engine, batch: int, density: float, args: argparse.Namespace, number: int) -> tuple[float, float]:
    """(median seconds of a step that only decodes, the sum over layers of the part of the experts it reads)."""
    generator = torch.Generator().manual_seed(number)
    for name in range(batch):
        prompt = torch.randint(6, 2000, (args.prompt,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=args.new, temperature=0, ignore_eos=True)
        engine.add(GenerationRequest(str(name), prompt, sampling, ce_density=density))
    steps, part = [], float(engine.model.num_layers)
    while engine.has_work:
        running = engine.scheduler.running
        decodes = len(running) == batch and all(sequence.generated for sequence in running)
        started = time.perf_counter()
        events = engine.step()
        if decodes:
            steps.append(time.perf_counter() - started)
            sets = [sequence.working_sets for sequence in running]
            if density < 1 and sets and all(sets):
                part = sum(float(torch.stack([one[layer] for one in sets]).any(0).double().mean()) for layer in sets[0])
        if failed := [event for _, event in events if isinstance(event, Failed)]:
            raise failed[0].error
    return statistics.median(steps), part


PARTS = {"recall": recall, "perplexity": perplexity, "speed": speed}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--part", choices=tuple(PARTS), required=True)
    add("--experts", type=int, default=64)
    add("--densities", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25])
    add("--seed", type=int, default=0)
    add("--model", type=Path, help="a checkpoint's directory")
    add("--text", type=Path, nargs="+", default=[], help="texts that perplexity is measured on")
    add("--scored", type=int, default=128, help="tokens scored behind every ``length`` of a text")
    add("--layouts", nargs="+", default=["weights", "activations", "random"])
    add("--length", type=int, default=1024, help="tokens of a document")
    add("--documents", type=int, default=10)
    add("--needles", type=int, default=20, help="questions to a document")
    add("--calibration", type=int, default=4096, help="tokens of the document that activations are seen on")
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--prompt", type=int, default=64)
    add("--new", type=int, default=24)
    add("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = PARTS[args.part](args)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps({"bench": f"experts {args.part}", "experts": args.experts, "threads": torch.get_num_threads(),
                      "torch": torch.__version__, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
