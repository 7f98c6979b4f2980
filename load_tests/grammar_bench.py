"""What constrained decoding costs: ``python load_tests/grammar_bench.py``.

The same requests with and without a JSON schema, in turn and ``--rounds`` times, on one engine; ``ratio`` is that of
the median decode steps. ``mask_ms`` is the mask alone, and ``compile_ms`` what comes before a request is queued: the
first also starts the process that tries grammars out, and ``known_ms`` is a grammar that was compiled before. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.engine.engine import Engine
from pacellm.model.load import load
from pacellm.text import constraints
from pacellm.text.grammar import Compiled, Grammars
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import GenerationRequest, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "minItems": 64,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 30},
                    "count": {"type": "integer", "minimum": 0, "maximum": 9999},
                    "kind": {"enum": ["red", "green", "blue"]},
                    "note": {"type": ["string", "null"], "maxLength": 60},
                },
                "required": ["name", "count", "kind", "note"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}


def decode_seconds(engine: Engine, prompts: list[list[int]], new: int, constraint: Compiled | None) -> list[float]:
    """Seconds of every step in which all requests decode."""
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=new, seed=number, ignore_eos=constraint is None)
        engine.add(GenerationRequest(str(number), prompt, sampling, constraint=constraint))
    found = []
    while engine.has_work:
        running = engine.scheduler.running
        decodes = len(running) == len(prompts) and all(sequence.is_decoding for sequence in running)
        started = time.perf_counter()
        engine.step()
        if decodes:
            found.append(time.perf_counter() - started)
    return found


def mask_seconds(constraint: Compiled, vocabulary: int, count: int) -> list[float]:
    """Seconds of a mask and of the token after it, along a random walk."""
    generator = torch.Generator().manual_seed(0)
    matcher, generated, found = constraint.new_matcher(), list[int](), []
    for _ in range(count):
        started = time.perf_counter()
        allowed = torch.from_numpy(matcher.allowed(generated, vocabulary)).nonzero()[:, 0]
        generated.append(int(allowed[torch.randint(len(allowed), (1,), generator=generator)]))
        is_over = matcher.is_complete(generated)
        found.append(time.perf_counter() - started)
        if is_over:
            matcher, generated = constraint.new_matcher(), []
    return found


def compile_seconds(grammars: Grammars, number: int) -> tuple[Compiled, float]:
    """The schema's constraint, and what it took; another ``number`` is another schema."""
    started = time.perf_counter()
    constraint = grammars.compile(constraints.of_json({**SCHEMA, "title": str(number)}, "schema"))
    return constraint, time.perf_counter() - started


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model, tokenizer = load(args.model), ChatTokenizer(args.model)
    engine = Engine(model, EngineConfig(kv_cache_memory=2**28), tokenizer.backend)
    grammars = Grammars(tokenizer.backend, frozenset(model.eos_token_ids))
    constraint, first = compile_seconds(grammars, 0)
    compiled = [compile_seconds(grammars, number)[1] for number in range(1, 11)]
    known = [compile_seconds(grammars, 0)[1] for _ in range(10)]
    grammars.close()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(6, 2000, (args.requests, args.prompt), generator=generator).tolist()
    decode_seconds(engine, prompts, args.new, constraint)  # warm-up
    rounds = [
        (decode_seconds(engine, prompts, args.new, None), decode_seconds(engine, prompts, args.new, constraint))
        for _ in range(args.rounds)
    ]
    free, bound = (1e3 * statistics.median([one for pair in rounds for one in pair[kind]]) for kind in (0, 1))
    result = {
        "bench": "grammar", "requests": args.requests, "prompt": args.prompt, "new": args.new, "rounds": args.rounds,
        "vocabulary": model.vocab_size, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "free_step_ms": round(free, 3), "constrained_step_ms": round(bound, 3), "ratio": round(bound / free, 3),
        "mask_ms": round(1e3 * statistics.median(mask_seconds(constraint, model.vocab_size, 400)), 3),
        "compile_first_ms": round(1e3 * first, 1), "compile_ms": round(1e3 * statistics.median(compiled), 1),
        "known_ms": round(1e3 * statistics.median(known), 3),
    }  # fmt: skip
    print(f"a step {free:.2f} ms, with a schema {bound:.2f} ms: {result['ratio']} times")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
