"""What working memory finds again: ``python load_tests/working_memory.py [MODEL] --length 200000 --documents 5``.

A document is read once into a session, beyond the budget, and each question is asked from a copy of it, by free
generation: an answer is right where it is the stated value (or contains it, for a model that writes sentences).
Documents are the demo's (``--texts`` FOLDER: prose of its ``*.txt`` with the demo's facts in it). Arms are indexes
(``lexical``, ``activity``, ``attention``, joined by +) and controls: ``recent`` calls nothing back, ``random`` as many
blocks by lot, ``foreign`` the blocks that another document's facts stand in, ``forced`` the right one, ``full``, alone,
is a server without working memory, where the document fits its context. Intervals are 95 % bootstraps over documents.

Records go to ``--out`` as JSON lines as they come; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_tests.bank_experiment import bootstrap
from pacellm.demo.generator import Document, Fact, make_document
from pacellm.demo.reader import ask, questions_of, read
from pacellm.llm import LLM
from pacellm.recall.recaller import Recaller
from pacellm.view import Recall

CONTROLS = ("recent", "random", "foreign", "forced")


class Arm:
    """Has a recaller call back what an arm says.

    Args:
        recaller: of the engine.
        tokenizer: for the places of facts.
    """

    def __init__(self, recaller: Recaller) -> None:
        self._recaller, self._votes = recaller, recaller.votes
        self._indexes, self._choose = recaller._indexes, recaller.choose
        self.block = recaller._block
        recaller.votes = self._voted  # type: ignore[method-assign]
        recaller.choose = self._chosen  # type: ignore[method-assign]
        self.name, self.place = "lexical", 0

    def use(self, name: str, place: int) -> None:
        """The arm, and about where the fact is stated that is asked for (or, as a control, another document's)."""
        self.name, self.place = name, place
        self._recaller._indexes = ("lexical",) if name in CONTROLS else tuple(name.split("+"))  # type: ignore[assignment]

    def _chosen(self, sequence: Any, asked: Any = None) -> Recall:
        if self.name != "recent":
            return self._choose(sequence, asked)
        recall = Recall.recent(sequence.turn.budget)
        sequence.recalls(recall)
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


def prose(texts: Path, length: int, num_facts: int, seed: int, tokenizer: Any) -> Document:
    """The demo's facts, spread over prose, each behind the end of a sentence."""
    files = sorted(texts.glob("*.txt"))
    rng = random.Random(seed)
    rng.shuffle(files)
    stated = make_document(60 * num_facts, num_facts, seed, tokenizer)
    sentences = [part + "." for part in stated.text.split(". ")]
    told = [next(one for one in sentences if fact.answer in one) for fact in stated.facts]
    text = ""
    while len(text) < 6 * length:
        text += files[len(text) % len(files)].read_text() + "\n\n"
    ids = tokenizer.encode(text)[:length]
    per = length // num_facts
    parts: list[str] = []
    facts: list[Fact] = []
    for number, (fact, sentence) in enumerate(zip(stated.facts, told, strict=True)):
        part = tokenizer.decode(ids[number * per : (number + 1) * per])
        place = part.find(". ", len(part) // 2) + 1 or len(part)
        parts.append(f"{part[:place]} {sentence.rstrip('.')}.{part[place:]}")
        before = len(tokenizer.encode("".join(parts)[: -len(part) + place]))
        facts.append(Fact(fact.question, fact.answer, min(1.0, before / length)))
    return Document("".join(parts), facts)


def main() -> None:
    """Run the arms and print what they come to."""
    options = _options()
    started = time.monotonic()
    records: list[dict[str, Any]] = []
    llm, arm = _served(options)
    for number in range(options.documents):
        seed = options.seed + number
        document = _document(options, llm.tokenizer, seed)
        clock, cpu = time.monotonic(), time.process_time()
        read(llm, document, "s")
        record = {"document": number, "seconds": time.monotonic() - clock, "cpu_seconds": time.process_time() - cpu}
        print(f"document {number}: read in {record['seconds']:.1f} s", flush=True)
        foreign = _document(options, llm.tokenizer, seed + 1000)
        for fact in questions_of(document, options.questions, 0):
            for name in options.arms:
                depth = fact.depth if name != "foreign" else foreign.facts[len(records) % len(foreign.facts)].depth
                if arm is not None:
                    arm.use(name, int(depth * options.length))
                clock = time.monotonic()
                answer = ask(llm, document, fact.question, "s")
                right = fact.answer in str(answer) if options.texts else str(answer) == fact.answer
                records.append({**record, "arm": name, "depth": fact.depth, "right": right, "answer": str(answer),
                                "wanted": fact.answer, "seconds": time.monotonic() - clock})  # fmt: skip
                with options.out.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
        llm.delete("s")
    print(json.dumps(summary(records, options, time.monotonic() - started, llm)))


def _served(options: argparse.Namespace) -> tuple[LLM, Arm | None]:
    """A server, and what has it call back what an arm says; the arm ``full`` stands by itself."""
    if options.arms == ["full"]:
        return LLM(options.model), None
    llm = LLM(
        options.model, working_memory=options.budget, working_memory_window=options.window,
        working_memory_index=_needed(options.arms), max_model_len=options.length + 4096,
        session_host_memory=options.host_memory, session_dir=options.session_dir,
    )  # fmt: skip
    return llm, Arm(llm.engine.parts.scheduling.recaller)  # type: ignore[arg-type]


def summary(records: list[dict[str, Any]], options: argparse.Namespace, seconds: float, llm: LLM) -> dict[str, Any]:
    """Recall by arm, with intervals."""
    by_arm: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for one in records:
        by_arm[one["arm"]][one["document"]].append(one["right"])
    arms = {}
    for name, documents in by_arm.items():
        shares = [sum(right) / len(right) for right in documents.values()]
        right, total = sum(map(sum, documents.values())), sum(map(len, documents.values()))
        arms[name] = {"right": right, "of": total, "interval": list(bootstrap(shares))}
        print(f"{name}: {right} of {total}")
    return {
        "model": options.model or "bundled", "length": options.length, "budget": options.budget, "arms": arms,
        "seconds": round(seconds, 1), "history_bytes_a_token": llm.engine.mover.host.history.bytes,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def _document(options: argparse.Namespace, tokenizer: Any, seed: int) -> Document:
    if options.texts is not None:
        return prose(options.texts, options.length, options.facts, seed, tokenizer)
    return make_document(options.length, options.facts, seed, tokenizer)


def _needed(arms: list[str]) -> tuple[Any, ...]:
    names = {part for name in arms if name not in CONTROLS for part in name.split("+")}
    return tuple(sorted(names)) or ("lexical",)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="as for pacellm serve (default: the bundled model)")
    add("--length", type=int, default=50_000)
    add("--budget", type=int, default=4096)
    add("--window", type=int, default=1024)
    add("--documents", type=int, default=1)
    add("--questions", type=int, default=20, help="of each document")
    add("--facts", type=int, default=40)
    add("--seed", type=int, default=500)
    add("--texts", type=Path)
    add("--host-memory", type=int, help="bytes for histories (default: half of what is free)")
    add("--session-dir", help="where what host memory cannot hold goes; an empty folder")
    add("--arms", type=lambda text: text.split(","), default=["lexical", "recent", "random", "foreign", "forced"])
    add("--out", type=Path, default=Path("working_memory.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
