"""What the banks do to answers: ``python load_tests/bank_experiment.py --out experiment``.

Every configuration reads the same documents. Then each question is asked with other banks in the place of the
document's own: none (``off`` for the question alone), an ``emptied`` bank, a ``foreign`` one (of another document),
one with the own keys and ``random`` values; and on a document that was read with a foreign bank present from its
first token (``foreign from the start``), or without banks (``off from the start``). An answer is right where every
token of the stated value is the most likely one. KL(own ‖ other) is in nats per answer token; intervals are 95 %
bootstraps over documents.

Records are appended to ``OUT.jsonl``, and a stopped run goes on where it was. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacellm.config import EngineConfig, PAConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import Document, make_document
from pacellm.demo.probe import Probe, copies, divergence, emptied, overwrite, with_random_values
from pacellm.demo.reader import prompt_of, questions_of, read
from pacellm.llm import LLM, TENANT
from pacellm.model.load import LoadedModel, load
from pacellm.modes import PAChoice
from pacellm.text.tokenizer import ChatTokenizer

FORMS: dict[str, dict[str, Any]] = {
    "reference": {"preset": "reference"},
    "paper": {"preset": "paper"},
    "per-slot": {"preset": "paper", "alpha": 0.2},
    "age": {"preset": "reference", "ties": "age"},
}
OTHERS = ("off", "emptied", "foreign", "random", "foreign from the start", "off from the start")
FOREIGN_SEED = 100_000


class Experiment:
    """One engine at a time, documents by seed.

    Args:
        length: tokens of a document. questions: stated facts asked about, per document.
    """

    def __init__(self, length: int, questions: int, layers: tuple[int, ...]) -> None:
        self.length, self.questions, self.layers = length, questions, layers
        self.tokenizer = ChatTokenizer(MODEL_PATH)
        self.model: LoadedModel = load(MODEL_PATH)
        self._plain: dict[int, list[Tensor]] = {}
        self._documents: dict[int, Document] = {}
        self._asked: dict[int, list[tuple[list[int], list[int]]]] = {}

    def document(self, seed: int) -> Document:
        """The document of a seed."""
        if seed not in self._documents:
            facts = max(self.questions, self.length // 256)
            self._documents[seed] = make_document(self.length, facts, seed, self.tokenizer.backend)
        return self._documents[seed]

    def asked(self, seed: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, answer with its end) of every question about a document, as ids."""
        if seed not in self._asked:
            document, end = self.document(seed), self.tokenizer.encode("<|end|>")
            self._asked[seed] = [
                (prompt_of(self.tokenizer, document, fact.question), self.tokenizer.encode(fact.answer) + end)
                for fact in questions_of(document, self.questions, 0)
            ]
        return self._asked[seed]

    def llm(self, bank: PAConfig) -> LLM:
        """A fresh engine on the one model."""
        config = EngineConfig(bank=bank, pa_layers=self.layers, kv_cache_memory=2**30, max_num_seqs=2)
        return LLM(self.model, tokenizer=self.tokenizer, config=config)

    def plain(self, seed: int) -> list[Tensor]:
        """Log-probabilities of every answer where the document was read without banks."""
        if seed not in self._plain:
            llm = self.llm(PAConfig())
            read(llm, self.document(seed), "plain", pa="off")
            self._plain[seed] = self._answers(llm, seed, "plain", "off")
        return self._plain[seed]

    def run(self, bank: PAConfig, seed: int) -> dict[str, Any]:
        """One document under one configuration."""
        document, foreign = self.document(seed), self.document(FOREIGN_SEED + seed)
        llm = self.llm(bank)
        probe = Probe(llm.engine)
        opening = read(llm, document, "own")
        read(llm, foreign, "foreign")
        theirs = copies(probe.banks("foreign"))
        read(llm, document, "foreign")  # the same session goes on with another document: its banks stay
        mine = copies(probe.banks("own"))
        others = {"emptied": emptied(mine), "foreign": theirs, "random": with_random_values(mine, seed)}

        own = self._answers(llm, seed, "own")
        found = {"off": self._answers(llm, seed, "own", "off")}
        for name, banks in others.items():
            overwrite(probe.banks("own"), banks)
            found[name] = self._answers(llm, seed, "own")
        overwrite(probe.banks("own"), mine)
        found["foreign from the start"] = self._answers(llm, seed, "foreign")
        found["off from the start"] = self.plain(seed)

        pool, row = llm.engine.pool, self._row(llm)
        assert pool is not None
        assert opening.bank is not None
        reads = opening.bank.hits + opening.bank.fuses + opening.bank.misses + opening.bank.empty
        return {
            "right": {"own": self._right(seed, own), **{name: self._right(seed, item) for name, item in found.items()}},
            "kl": {
                name: statistics.mean(
                    kl for mine_, other in zip(own, item, strict=True) for kl in divergence(mine_, [other])
                )
                for name, item in found.items()
            },
            "rank": pool.effective_ranks(row),
            "age": pool.slot_ages(row),
            "filled": pool.filled(row),
            "hits": opening.bank.hits / reads,
            "fuses": opening.bank.fuses / reads,
            "misses": opening.bank.misses / reads,
        }

    def _row(self, llm: LLM) -> int:
        session = llm.engine.sessions.get((TENANT, "own"))
        assert session is not None
        assert session.row is not None
        return session.row

    def _answers(self, llm: LLM, seed: int, session: str, pa: PAChoice = "on") -> list[Tensor]:
        probe = Probe(llm.engine)
        return [probe.logprobs(prompt, answer, session, pa) for prompt, answer in self.asked(seed)]

    def _right(self, seed: int, found: list[Tensor]) -> int:
        return sum(
            logprobs.argmax(-1).tolist() == answer
            for logprobs, (_, answer) in zip(found, self.asked(seed), strict=True)
        )


def bootstrap(values: list[float], mean: Callable[[list[float]], float] = statistics.mean) -> tuple[float, float]:
    """95 % interval of the mean, resampling documents 2,000 times."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(2000))
    return means[49], means[1949]


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per configuration, means over documents."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(json.dumps(record["config"], sort_keys=True), []).append(record)
    rows = []
    for found in groups.values():
        asked = found[0]["questions"]
        row: dict[str, Any] = {**found[0]["config"], "documents": len(found), "asked": asked * len(found)}
        for name in ("own", *OTHERS):
            row[f"right {name}"] = sum(record["right"][name] for record in found)
        gain = [(record["right"]["own"] - record["right"]["off from the start"]) / asked for record in found]
        row["gain"], row["gain interval"] = statistics.mean(gain), bootstrap(gain)
        for name in OTHERS:
            kl = [record["kl"][name] for record in found]
            row[f"kl {name}"], row[f"kl {name} interval"] = statistics.mean(kl), bootstrap(kl)
        for name in ("rank", "age", "filled"):
            row[name] = {layer: statistics.mean(record[name][layer] for record in found) for layer in found[0][name]}
        for name in ("hits", "fuses", "misses"):
            row[name] = statistics.mean(record[name] for record in found)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table for people."""
    print(
        f"{'layers':7}{'form':11}{'seg':>5}{'M':>5}{'tokens':>8}{'asked':>6}  {'right own / off':16}{'gain, 95 %':22}"
        f"{'rank':12}{'age':14}{'hit+fuse':>8}   KL own ‖ {', '.join(OTHERS)}"
    )
    for row in rows:
        low, high = row["gain interval"]
        ranks, ages = (" ".join(f"{value:.1f}" for value in row[name].values()) for name in ("rank", "age"))
        kls = " ".join(f"{row[f'kl {name}']:.1e}" for name in OTHERS)
        print(
            f"{row['layers']:7}{row['form']:11}{row['segment']:>5}{row['bank_size']:>5}{row['length']:>8}"
            f"{row['asked']:>6}  {row['right own']:>4} / {row['right off from the start']:<9}"
            f"{row['gain']:+.3f} [{low:+.3f}, {high:+.3f}]   {ranks:12}{ages:14}"
            f"{row['hits'] + row['fuses']:>8.3f}   {kls}"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--segments", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--bank-sizes", type=int, nargs="+", default=[32, 100])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    args = parser.parse_args()

    log = args.out.with_suffix(".jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(json.dumps(record["config"], sort_keys=True), record["seed"]) for record in records}
    experiment = Experiment(args.length, args.questions, tuple(args.layers))
    for form in args.forms:
        for segment in args.segments:
            for size in args.bank_sizes:
                bank = PAConfig(**FORMS[form], segment=segment, bank_size=size)
                config = {
                    "form": form,
                    "segment": segment,
                    "bank_size": size,
                    "length": args.length,
                    "layers": ",".join(map(str, args.layers)),
                }
                started = time.monotonic()
                for seed in range(args.first_seed, args.first_seed + args.documents):
                    if (json.dumps(config, sort_keys=True), seed) in done:
                        continue
                    record = {"config": config, "seed": seed, "questions": args.questions, **experiment.run(bank, seed)}
                    record = json.loads(json.dumps(record))
                    records.append(record)
                    with log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                print(f"{config} {time.monotonic() - started:.1f} s", flush=True)
    rows = summarise(records)
    show(rows)
    print(json.dumps({"bench": "bank_experiment", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
