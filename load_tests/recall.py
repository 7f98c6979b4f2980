"""Recall of the bundled model by length and depth, through the engine: ``python load_tests/recall.py --out recall``.

Every document is read once, PA off and PA on, and every question is asked from a copy of what that left. An answer
counts only if it is exactly the stated value. Outcomes are appended to ``OUT.jsonl``, and a stopped run goes on where
it was; with matplotlib installed, ``OUT.png`` draws recall over length and depth. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pacellm.config import EngineConfig, PAConfig
from pacellm.demo.generator import make_document
from pacellm.demo.reader import ask, questions_of, read
from pacellm.demo.shares import interval
from pacellm.llm import LLM

DEPTHS = 10
Outcome = dict[str, Any]


def measure(llm: LLM, length: int, seed: int, args: argparse.Namespace, mode: str) -> list[Outcome]:
    """Read one document and ask all its questions."""
    document = make_document(length, max(args.needles, length // 256), seed, llm.tokenizer.backend)
    started = time.monotonic()
    opening = read(llm, document, f"{mode} {length} {seed}")
    seconds = time.monotonic() - started
    outcomes = []
    for fact in questions_of(document, args.needles, args.unknown):
        answer = ask(llm, document, fact.question, f"{mode} {length} {seed}")
        assert answer.usage.cached_tokens == opening.usage.prompt_tokens
        outcomes.append(
            {
                "mode": mode,
                "length": length,
                "seed": seed,
                "depth": fact.depth,
                "expected": fact.answer,
                "answer": answer.text,
                "right": answer.text == fact.answer,
                "read_seconds": round(seconds, 2),
            }
        )
    return outcomes


def summarise(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """A row per mode and length."""
    groups: dict[tuple[int, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome["length"], outcome["mode"]), []).append(outcome)
    rows = []
    for (length, mode), found in sorted(groups.items()):
        stated = [outcome["right"] for outcome in found if outcome["depth"] >= 0]
        unknown = [outcome["right"] for outcome in found if outcome["depth"] < 0]
        low, high = interval(sum(stated), len(stated))
        rows.append(
            {
                "length": length,
                "pa": mode,
                "documents": len({outcome["seed"] for outcome in found}),
                "asked": len(stated),
                "right": sum(stated),
                "recall": round(sum(stated) / len(stated), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "unknown": len(unknown),
                "not_stated_right": sum(unknown),
            }
        )
    return rows


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Recall over length and depth, a panel per mode."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    lengths = sorted({outcome["length"] for outcome in outcomes})
    modes = sorted({outcome["mode"] for outcome in outcomes})
    figure, axes = pyplot.subplots(1, len(modes), figsize=(4.6 * len(modes), 3.9), sharey=True, layout="constrained")
    for axis, mode in zip(np.atleast_1d(axes), modes, strict=True):
        grid = np.full((DEPTHS, len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            for row in range(DEPTHS):
                cell = [
                    o["right"]
                    for o in outcomes
                    if o["mode"] == mode
                    and o["length"] == length
                    and row == min(int(o["depth"] * DEPTHS), DEPTHS - 1)
                    and o["depth"] >= 0
                ]
                if cell:
                    grid[row, column] = sum(cell) / len(cell)
                    text = f"{100 * grid[row, column]:.0f}"
                    axis.text(column, row, text, ha="center", va="center", fontsize=8)
        image = axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(DEPTHS), [f"{10 * row}–{10 * row + 10} %" for row in range(DEPTHS)])
        axis.set_xlabel("document, tokens")
        axis.set_title(f"Persistent Activity {mode}")
    np.atleast_1d(axes)[0].set_ylabel("where the fact is stated")
    figure.colorbar(image, ax=axes, label="recall", shrink=0.8)
    figure.suptitle("Exact answers of the bundled model, in % (temperature 0)")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 200_000])
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--needles", type=int, default=20, help="facts asked about, per document")
    parser.add_argument("--unknown", type=int, default=5, help="questions without an answer, per document")
    parser.add_argument("--modes", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--preset", choices=("reference", "paper"), default="reference")
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    args = parser.parse_args()

    log = args.out.with_suffix(".jsonl")
    outcomes = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(outcome["mode"], outcome["length"], outcome["seed"]) for outcome in outcomes}
    for length in args.lengths:
        for mode in args.modes:
            config = EngineConfig(pa=mode == "on", kv_cache_memory=3 * 2**30, bank=PAConfig(preset=args.preset))
            for seed in range(args.documents):
                if (mode, length, seed) in done:
                    continue
                found = measure(LLM(config=config), length, seed, args, mode)
                with log.open("a") as file:
                    file.writelines(json.dumps(outcome) + "\n" for outcome in found)
                outcomes += found
                right = sum(outcome["right"] for outcome in found)
                print(
                    f"{length:>8,} tokens, PA {mode:3}, document {seed}: {right} of {len(found)} right, read in "
                    f"{found[0]['read_seconds']} s",
                    flush=True,
                )
    rows = summarise(outcomes)
    for row in rows:
        print(
            f"{row['length']:>8,}  PA {row['pa']:3}  {row['right']}/{row['asked']} = {row['recall']:.3f}"
            f"  [{row['low']:.3f}, {row['high']:.3f}]  not stated {row['not_stated_right']}/{row['unknown']}"
        )
    try:
        draw(outcomes, args.out.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no picture")
    print(json.dumps({"bench": "recall", "preset": args.preset, "rows": rows}))


if __name__ == "__main__":
    main()
