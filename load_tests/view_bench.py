"""What a long history costs once it is read: ``python load_tests/view_bench.py [MODEL] --lengths 4000,64000,200000``.

Sessions of these lengths stand side by side in one process, all but the first beyond ``--budget``. In ``--rounds``,
taking turns: a question of 24 tokens with one token of answer, and with ``--tokens`` more, whose difference is the time
of a decode step; and the question again after the session has left the device. Medians, and ratios to reading the
session and to the first length's step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pacellm.demo.library_text import library_text
from pacellm.engine.engine import run_until_idle
from pacellm.llm import LLM
from pacellm.types import Outline

_QUESTION = 24


def text_of(llm: LLM, num_tokens: int) -> list[int]:
    """Token ids of the library's text, again and again where it is too short."""
    ids: list[int] = []
    while len(ids) < num_tokens:
        for paragraph in library_text():
            ids += llm.tokenizer.encode(paragraph + "\n\n")
            if len(ids) >= num_tokens:
                break
    return ids[:num_tokens]


class Session:
    """One history, read once."""

    def __init__(self, llm: LLM, name: str, ids: list[int]) -> None:
        self._llm, self._name, self._ids = llm, name, ids
        self.read = self._timed(ids, 0, commit=True)
        self.seconds: dict[str, list[float]] = {"question": [], "step": [], "evicted": []}

    def round(self, tokens: int) -> None:
        """Measure each once."""
        asked = self._ids + self._ids[-_QUESTION:]
        one = self._timed(asked, 1)
        self.seconds["question"].append(one)
        self.seconds["step"].append((self._timed(asked, 1 + tokens) - one) / tokens)
        while self._llm.engine.eviction.evict_one():
            run_until_idle(self._llm.engine)
        self.seconds["evicted"].append(self._timed(asked, 1))

    def _timed(self, ids: list[int], tokens: int, *, commit: bool = False) -> float:
        started = time.perf_counter()
        self._llm.generate(
            [ids], session=self._name, commit=commit, outline=Outline(question=(_QUESTION, 0)), max_tokens=tokens,
            temperature=0, ignore_eos=True,
        )  # fmt: skip
        return time.perf_counter() - started


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--lengths", type=lambda text: [int(one) for one in text.split(",")], default=[4000, 64000])
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    sessions: dict[int, Session] = {}
    with LLM(options.model, working_memory=options.budget, max_model_len=max(options.lengths) + 1024) as llm:
        ids = text_of(llm, max(options.lengths))
        for length in options.lengths:
            sessions[length] = Session(llm, f"s{length}", ids[:length])
            print(f"{length:,} tokens read in {sessions[length].read:.1f} s", flush=True)
        for _ in range(options.rounds):
            for session in sessions.values():
                session.round(options.tokens)
    print(json.dumps({"model": options.model or "bundled", "budget": options.budget, "lengths": _told(sessions)}))


def _told(sessions: dict[int, Session]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    first = next(iter(sessions.values())).seconds["step"]
    for length, one in sessions.items():
        medians = {name: statistics.median(seconds) for name, seconds in one.seconds.items()}
        ratios = [step / base for step, base in zip(one.seconds["step"], first, strict=True)]
        found[length] = {
            "read_s": round(one.read, 2), "question_s": round(medians["question"], 3),
            "step_ms": round(1000 * medians["step"], 2), "step_to_first": round(statistics.median(ratios), 3),
            "evicted_s": round(medians["evicted"], 3), "evicted_to_read": round(medians["evicted"] / one.read, 4),
        }  # fmt: skip
        print(f"{length:>9,}: {found[length]}", flush=True)
    return found


if __name__ == "__main__":
    main()
