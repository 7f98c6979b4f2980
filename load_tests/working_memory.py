"""What working memory finds again: ``python load_tests/working_memory.py [MODEL] --length 200000 --documents 5``.

A document is read once into a session, beyond the budget, and each question is asked from a copy of it, by free
generation: an answer is right where it is the stated value (or contains it, for a model that writes sentences), and
the fact was *shown* where what was called back or the window has it. Documents are the demo's; with ``--texts`` FOLDER
they are prose of its ``*.txt`` with the demo's facts in it, or with ``--written`` those of load_tests/planted, which
are asked for in their own words and in others.

Arms are indexes (``lexical``, ``activity``, ``attention``, joined by +; behind ``/plain`` their votes are not compared
with those for null questions) and controls: ``recent`` calls nothing back, ``random`` as many
blocks by lot, ``foreign`` the blocks that another document's facts stand in, ``forced`` the right one, ``full``, alone,
is a server without working memory, where the document fits its context (``--rope-scaling``). Intervals are 95 %
bootstraps over documents.

Records go to ``--out`` as JSON lines as they come; the last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_tests.bank_experiment import bootstrap
from load_tests.planted.asking import Asker
from load_tests.planted.documents import Planted, Text, prose, synthetic
from pacellm.llm import LLM
from pacellm.model.load import load
from pacellm.model.retrieval import Nulls
from pacellm.real_models import resolve
from pacellm.recall.recaller import Recaller
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.view import WHOLE, Recall

CONTROLS = ("recent", "random", "foreign", "forced")
PLAIN = "/plain"


class Arm:
    """Has a recaller call back what an arm says."""

    def __init__(self, recaller: Recaller) -> None:
        self._recaller, self._votes = recaller, recaller.votes
        self._choose = recaller.choose
        self.block = recaller._block
        recaller.votes = self._voted  # type: ignore[method-assign]
        recaller.choose = self._chosen  # type: ignore[method-assign]
        self.name, self.place, self._view = "lexical", 0, WHOLE
        self._compared = recaller._retrieval, recaller._null_bits

    def use(self, name: str, place: int) -> None:
        """The arm, and where the fact is stated that is asked for (or, as a control, another document's)."""
        self.name, self.place = name, place
        indexes = ("lexical",) if name in CONTROLS else name.removesuffix(PLAIN).split("+")
        self._recaller._indexes = tuple(indexes)  # type: ignore[assignment]
        retrieval, bits = self._compared
        if name.endswith(PLAIN):
            retrieval, bits = dataclasses.replace(retrieval, nulls=Nulls()), None
        self._recaller._retrieval, self._recaller._null_bits = retrieval, bits

    def sees(self, first: int, length: int) -> bool:
        """What was called back last, or the window, has the middle of some tokens."""
        place = first + length // 2
        return place >= self._view.start or any(span.start <= place < span.end for span in self._view.spans)

    def _chosen(self, sequence: Any, asked: Any = None) -> Recall:
        if self.name == "recent":
            recall = Recall.recent(sequence.turn.budget)
            sequence.recalls(recall)
        else:
            recall = self._choose(sequence, asked)
        self._view = recall.view(sequence.question.start)
        return recall

    def _voted(self, index: Any, sequence: Any, question: range, end: int, asked: Any) -> np.ndarray:
        if self.name not in CONTROLS:
            return self._votes(index, sequence, question, end, asked)
        count = end // self.block
        if self.name == "random":
            return np.random.default_rng(question.start).random(count)
        votes, number = np.zeros(count), self.place // self.block
        votes[max(0, number - 1) : number + 2] = 1.0
        return votes


def main() -> None:
    """Run the arms and print what they come to."""
    options = _options()
    started = time.monotonic()
    records: list[dict[str, Any]] = []
    llm, arm = served(options)
    for number in range(options.first, options.first + options.documents):
        document = _document(options, llm.tokenizer, options.seed + number)
        asker = Asker(llm, document.text, options.max_tokens)
        clock, cpu = time.monotonic(), time.process_time()
        asker.read()
        seconds, cpu = time.monotonic() - clock, time.process_time() - cpu
        record = {"document": number, "read_seconds": seconds, "cpu_seconds": cpu}
        print(f"document {number}: read in {seconds:.1f} s", flush=True)
        foreign = _document(options, llm.tokenizer, options.seed + number + 1000) if "foreign" in options.arms else None
        step = len(document.facts) / options.questions
        for fact in (document.facts[int((one + 0.5) * step)] for one in range(options.questions)):
            for words, question in fact.questions.items():
                for name in options.arms:
                    told = foreign.facts[len(records) % len(foreign.facts)] if foreign and name == "foreign" else fact
                    records.append({**record, "arm": name, "words": words,
                                    **_asked(asker, arm, name, fact, told.place, question, options)})  # fmt: skip
                    with options.out.open("a") as file:
                        file.write(json.dumps(records[-1]) + "\n")
        asker.forget()
    print(json.dumps(summary(records, options, time.monotonic() - started, llm)))


def _asked(
    asker: Asker, arm: Arm | None, name: str, fact: Planted, place: int, question: str, options: argparse.Namespace
) -> dict[str, Any]:
    """A question's answer, and what it came of."""
    if arm is not None:
        arm.use(name, asker.opening + place)
    clock = time.monotonic()
    answer = asker.ask(question)
    return {
        "right": fact.answer in answer if options.texts else answer == fact.answer,
        "shown": arm is None or arm.sees(asker.opening + fact.place, fact.length),
        "place": fact.place, "question": question, "answer": answer, "wanted": fact.answer,
        "seconds": time.monotonic() - clock,
    }  # fmt: skip


def served(options: argparse.Namespace) -> tuple[LLM, Arm | None]:
    """A server, and what has it call back what an arm says; the arm ``full`` stands by itself."""
    model: Any = options.model
    more: dict[str, Any] = {}
    if options.rope_scaling is not None:
        path = resolve(model)
        model, more = load(path, rope_scaling=options.rope_scaling), {"tokenizer": ChatTokenizer(path)}
    if options.arms == ["full"]:
        return LLM(model, max_model_len=options.max_model_len, **more), None
    llm = LLM(
        model, working_memory=options.budget, working_memory_window=options.window,
        working_memory_index=_needed(options.arms), max_model_len=options.length + 4096,
        session_host_memory=options.host_memory, session_dir=options.session_dir, **more,
    )  # fmt: skip
    return llm, Arm(llm.engine.parts.scheduling.recaller)  # type: ignore[arg-type]


def summary(records: list[dict[str, Any]], options: argparse.Namespace, seconds: float, llm: LLM) -> dict[str, Any]:
    """Recall by arm and words, with intervals."""
    by_arm: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for one in records:
        by_arm[one["arm"] if one["words"] == "own" else f"{one['arm']}, other words"][one["document"]].append(one)
    arms = {}
    for name, documents in by_arm.items():
        arms[name] = {"of": sum(map(len, documents.values()))}
        for what in ("right", "shown"):
            counts = [sum(one[what] for one in asked) for asked in documents.values()]
            shares = [count / len(asked) for count, asked in zip(counts, documents.values(), strict=True)]
            arms[name] |= {what: sum(counts), f"{what}_interval": list(bootstrap(shares))}
        print(f"{name}: of {arms[name]['of']} shown {arms[name]['shown']}, right {arms[name]['right']}")
    return {
        "model": options.model or "bundled", "length": options.length, "budget": options.budget, "arms": arms,
        "seconds": round(seconds, 1), "history_bytes_a_token": llm.engine.mover.host.history.bytes,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def _document(options: argparse.Namespace, tokenizer: Any, seed: int) -> Text:
    if options.texts is not None:
        return prose(options.texts, options.length, options.facts, seed, tokenizer, written=options.written)
    return synthetic(options.length, options.facts, seed, tokenizer)


def _needed(arms: list[str]) -> tuple[Any, ...]:
    names = {part for name in arms if name not in CONTROLS for part in name.removesuffix(PLAIN).split("+")}
    return tuple(sorted(names)) or ("lexical",)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="as for pacellm serve (default: the bundled model)")
    add("--length", type=int, default=50_000)
    add("--budget", type=int, default=4096)
    add("--window", type=int, default=1024)
    add("--documents", type=int, default=1)
    add("--first", type=int, default=0, help="number of the first document, for runs in pieces")
    add("--questions", type=int, default=20, help="of each document")
    add("--facts", type=int, default=40)
    add("--seed", type=int, default=500)
    add("--texts", type=Path)
    add("--written", action="store_true", help="the facts of load_tests/planted, in their words and in others")
    add("--max-tokens", type=int, default=24, help="of an answer")
    add("--rope-scaling", type=json.loads, help="as for pacellm serve")
    add("--max-model-len", type=int, help="of the arm full")
    add("--host-memory", type=int, help="bytes for histories (default: half of what is free)")
    add("--session-dir", help="where what host memory cannot hold goes; an empty folder")
    add("--arms", type=lambda text: text.split(","), default=["lexical", "recent", "random", "foreign", "forced"])
    add("--out", type=Path, default=Path("working_memory.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
