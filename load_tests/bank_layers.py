"""What banks carry on real models: ``python load_tests/bank_layers.py MODEL --texts FOLDER --out NAME``.

FOLDER has a folder of ``*.txt`` per kind of prose. A document is a stretch of a file with a fact inserted every few
hundred tokens. It is read in segments with banks on a set of layers, and then, the banks standing still, (a) its prose
goes on for ``--rest`` tokens and (b) each fact is asked for: with the document's own banks, emptied ones, those of a
foreign document (the one before, of another kind), the own keys with random values, and without banks from the start.
All that twice: *behind* the document, and *alone*, the document dropped from the context and only the banks kept. What
goes better alone with the own bank than with a foreign one, the bank has carried.

Sets of layers are the paper's two scaled to the model, together and each alone, and the two layers that harmed least
in a sweep over all layers, each alone, on the first ``--selection`` documents (perplexity of a document's first half
behind its first segment, banks written as it is read). The other documents are measured. An answer is right
where every token of the fact's five digits is the most likely one. Ratios are of perplexities, KL is in nats per
token, intervals are 95 % bootstraps over documents, paired. The model runs in transformers, layers below the first
patched one once per document; the banks are ``pacellm.memory.bank.Bank``.

Records are appended to ``NAME.jsonl``, and a stopped run goes on where it was. ``--small`` takes tiny documents. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_tests.bank_experiment import bootstrap
from load_tests.layers.bench import OTHERS, Bench, Measurement, measure, measure_each, sweep
from load_tests.layers.documents import Document, Library
from load_tests.layers.rig import Rig
from pacellm.config import PAConfig, default_pa_layers

PRESETS = ("reference", "paper")
SMALL = {
    "documents": 2,
    "selection": 1,
    "tokens": 128,
    "rest": 32,
    "segment": 32,
    "bank_size": 8,
    "questions": 1,
}


class Log:
    """Records of a run, on disk as they come.

    Args:
        path: of the JSON lines. settings: those that records must share to be comparable.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [
            record for line in lines if (record := json.loads(line))["settings"] == settings
        ]

    def find(self, **keys: Any) -> list[dict[str, Any]]:
        """The records that agree with these keys."""
        return [record for record in self.records if all(record.get(name) == value for name, value in keys.items())]

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        self.records.append(json.loads(json.dumps({"settings": self._settings, **record})))
        with self._path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")


def sweep_all(rig: Rig, documents: list[Document], args: argparse.Namespace, log: Log) -> None:
    """Every layer alone under both presets."""
    for document in documents:
        if len(log.find(kind="sweep", document=document.name)) == len(PRESETS) * len(rig.sizes):
            continue
        done = {(record["preset"], record["layers"][0]) for record in log.find(kind="sweep", document=document.name)}
        todo = [(preset, layer) for preset in PRESETS for layer in rig.sizes if (preset, layer) not in done]
        for found in sweep(rig, document, [(config_of(args, preset), layer) for preset, layer in todo], args.stride):
            log.add({"kind": "sweep", "document": document.name, **found})
        print(f"sweep {document.name}: {time.process_time():.0f} s of CPU time so far", flush=True)


def ratios_of(records: list[dict[str, Any]], one: str, other: str) -> dict[str, dict[int, list[float]]]:
    """Perplexity ratios of each layer alone and their intervals, by preset."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        layer = record["layers"][0]
        found.setdefault(record["preset"], {}).setdefault(layer, []).append(record[one] - record[other])
    return {preset: {layer: _ratio(values) for layer, values in layers.items()} for preset, layers in found.items()}


class Plan(NamedTuple):
    """Layers that are measured under a preset."""

    preset: str
    set: str
    layers: tuple[int, ...]


def chosen(rig: Rig, log: Log) -> list[Plan]:
    """The paper's layers, and those that harmed least."""
    low, *high = default_pa_layers(len(rig.sizes), tuple(rig.sizes))
    sets = {"paper's two": (low, *high), "paper's first": (low,)} | ({"paper's last": (high[0],)} if high else {})
    plans = []
    for preset, ratios in ratios_of(log.find(kind="sweep"), "own", "off").items():
        best = [layer for layer in sorted(ratios, key=lambda layer: ratios[layer][0]) if (layer,) not in sets.values()]
        least = {name: (layer,) for name, layer in zip(("least harm", "next"), best, strict=False)}
        plans += [Plan(preset, name, layers) for name, layers in (sets | least).items()]
    return plans


def config_of(args: argparse.Namespace, preset: Any) -> PAConfig:
    """The banks' config."""
    return PAConfig(preset=preset, segment=args.segment, bank_size=args.bank_size)


class Shelf:
    """Bank states of documents, by plan; a document whose banks are not there is read.

    Attributes:
        plans: those that there are.
    """

    def __init__(self, rig: Rig, args: argparse.Namespace, plans: list[Plan]) -> None:
        self._rig, self._args, self.plans = rig, args, plans
        self._found: dict[tuple[str, Plan], dict[int, Any]] = {}

    def of(self, document: Document, plan: Plan) -> dict[int, Any]:
        """States by layer."""
        if (document.name, plan) not in self._found:
            bench = self.bench(document)
            for one in self.plans:
                self.put(document, one, bench.learn(self.empty(one)))
        return self._found[document.name, plan]

    def put(self, document: Document, plan: Plan, states: dict[int, Any]) -> None:
        """Keep states that are known already."""
        self._found[document.name, plan] = states

    def forget(self, document: Document) -> None:
        """Drop a document's states."""
        self._found = {key: states for key, states in self._found.items() if key[0] != document.name}

    def bench(self, document: Document) -> Bench:
        """A document and what the plain model makes of it."""
        return Bench(self._rig, document, self._args.stride)

    def empty(self, plan: Plan) -> dict[int, Any]:
        """Empty banks."""
        return self._rig.banks(plan.layers, config_of(self._args, plan.preset))


def every_layer(rig: Rig) -> list[Plan]:
    """Each layer alone."""
    return [Plan(preset, "each", (layer,)) for preset in PRESETS for layer in rig.sizes]


def measure_all(documents: list[Document], shelf: Shelf, kind: str, work: Measurement, log: Log) -> None:
    """Every plan of a shelf on every document but the first, the one before being the foreign one."""
    for foreign, document in itertools.pairwise(documents):
        done = {(record["preset"], tuple(record["layers"])) for record in log.find(kind=kind, document=document.name)}
        if not (todo := [plan for plan in shelf.plans if (plan.preset, plan.layers) not in done]):
            continue
        theirs = {plan: shelf.of(foreign, plan) for plan in todo}
        bench = shelf.bench(document)
        for plan in todo:
            record, own = work(bench, shelf.empty(plan), theirs[plan])
            shelf.put(document, plan, own)
            log.add({"kind": kind, "document": document.name, "foreign": foreign.name, **plan._asdict(), **record})
        shelf.forget(foreign)
        print(f"{kind} {document.name}: {time.process_time():.0f} s of CPU time so far", flush=True)


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per preset and set, means over documents with intervals."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["preset"], record["set"]), []).append(record)
    rows = []
    for (preset, name), found in groups.items():
        row: dict[str, Any] = {"preset": preset, "set": name, "layers": found[0]["layers"], "documents": len(found)}
        row["asked"] = sum(record["asked"] for record in found)
        for key in ("rank", "filled"):
            row[key] = statistics.mean(record[key] for record in found)
        for key in ("reads own", "reads foreign"):
            row[key] = {kind: statistics.mean(record[key][kind] for record in found) for kind in found[0][key]}
        for place in ("behind", "alone"):
            row[place] = _place([record[place] for record in found], found[0]["asked"])
        rows.append(row)
    return rows


def _place(found: list[dict[str, Any]], asked: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in ("own", *OTHERS):
        row[f"right {name}"] = sum(record[name]["right"] for record in found)
        if name != "off":
            row[f"{name}/off"] = _ratio([record[name]["rest"] - record["off"]["rest"] for record in found])
    for name in OTHERS:
        row[f"own/{name}"] = _ratio([record["own"]["rest"] - record[name]["rest"] for record in found])
        row[f"answer own-{name}"] = _mean([record["own"]["answers"] - record[name]["answers"] for record in found])
        row[f"right own-{name}"] = _mean([(record["own"]["right"] - record[name]["right"]) / asked for record in found])
        for kind in ("kl rest", "kl answers"):
            row[f"{kind} {name}"] = _mean([record[kind][name] for record in found])
    return row


def _mean(values: list[float]) -> list[float]:
    """Mean and interval."""
    return [statistics.fmean(values), *bootstrap(values, statistics.fmean)]


def _ratio(values: list[float]) -> list[float]:
    """A ratio of perplexities and its interval, from differences in nats."""
    return [math.exp(value) for value in _mean(values)]


def show(ratios: dict[str, dict[str, dict[int, list[float]]]], rows: list[dict[str, Any]]) -> None:
    """Tables in Markdown."""
    columns = {f"{preset}: {name}": layers for preset in PRESETS for name, found in ratios.items()
               if (layers := found.get(preset))}  # fmt: skip
    print(f"| layer | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for layer in next(iter(columns.values()), {}):
        print(f"| {layer} | " + " | ".join(_text(found[layer]) for found in columns.values()) + " |")
    titles = ("preset", "layers", "own/off", "own/foreign", "own/random", "own/emptied",
              "right off, own, foreign, random, emptied", "answer own-foreign", "KL own‖foreign of prose", "of answers",
              "hit, fuse own", "foreign", "rank")  # fmt: skip
    for place in ("behind", "alone"):
        print(f"\n{place}:\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
        for row in rows:
            found = row[place]
            ratio = " | ".join(_text(found[f"own/{name}"]) for name in ("off", "foreign", "random", "emptied"))
            right = ", ".join(str(found[f"right {name}"]) for name in ("off", "own", "foreign", "random", "emptied"))
            reads = " | ".join(f"{row[f'reads {who}']['hits']:.2f}, {row[f'reads {who}']['fuses']:.2f}"
                               for who in ("own", "foreign"))  # fmt: skip
            print(f"| {row['preset']} | {row['set']}: {', '.join(map(str, row['layers']))} | {ratio} | {right} of "
                  f"{row['asked']} | {_text(found['answer own-foreign'])} | {_text(found['kl rest foreign'], '.1e')} | "
                  f"{_text(found['kl answers foreign'], '.1e')} | {reads} | {row['rank']:.1f} |")  # fmt: skip


def _text(values: list[float], form: str = ".3f") -> str:
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint")
    parser.add_argument("--texts", type=Path, required=True, help="folder of folders of *.txt, one per kind")
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("--documents", type=int, default=8, help="that are measured")
    parser.add_argument("--selection", type=int, default=1, help="documents to choose layers on")
    parser.add_argument("--tokens", type=int, default=2048, help="of a document, facts included")
    parser.add_argument("--rest", type=int, default=256, help="tokens of prose behind it")
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--bank-size", type=int, default=100)
    parser.add_argument("--questions", type=int, default=5, help="a document")
    parser.add_argument("--stride", type=int, default=2, help="every which token of prose is scored")
    parser.add_argument("--small", action="store_true", help="tiny documents: does it run at all")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)

    names = ("tokens", "rest", "segment", "bank_size", "questions", "stride")
    log = Log(
        args.out.with_suffix(".jsonl"), {"model": Path(args.model).name} | {name: vars(args)[name] for name in names}
    )
    library = Library(args.model, args.texts, args.tokens, args.rest, args.questions)
    documents = library.documents(args.selection + args.documents)
    rig = Rig(args.model)
    measured = documents[args.selection - 1 :]
    with torch.inference_mode():
        sweep_all(rig, documents[: args.selection], args, log)
        measure_all(measured, Shelf(rig, args, chosen(rig, log)), "measure", measure, log)
        measure_all(measured, Shelf(rig, args, every_layer(rig)), "each", measure_each, log)
    each = log.find(kind="each")
    ratios = {
        "reading, selection": ratios_of(log.find(kind="sweep"), "own", "off"),
        "alone, own/off": ratios_of(each, "own", "off"),
        "alone, own/foreign": ratios_of(each, "own", "foreign"),
    }
    rows = summarise(log.find(kind="measure"))
    show(ratios, rows)
    print(json.dumps({"bench": "bank_layers", "torch": torch.__version__, "layers": ratios, "rows": rows}))


if __name__ == "__main__":
    main()
