"""More than a needle: ``python load_tests/working_memory_tasks.py MODEL --texts FOLDER --length 16000 --arms lexical``.

Two hops, chains of variables, counts and a list of twenty, in prose, by free generation: the part of what is wanted
that an answer names. And how likely the model finds the true continuation of the prose, in nats a token of 200 that
follow the document's first 32 (the question of its view). Arms are as of load_tests/working_memory.py; ``full``, alone,
is a server without working memory, and with ``--last N`` of a document's last N tokens.

Records go to ``--out`` as JSON lines as they come; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_tests.bank_experiment import bootstrap
from load_tests.planted.asking import Asker
from load_tests.planted.tasks import task_text
from load_tests.working_memory import served
from pacellm.engine.answer import Answers
from pacellm.engine.sequence import Sequence
from pacellm.run.sampler import logprob
from pacellm.types import TokenLogprob

_GIVEN, _SCORED = 32, 200  # tokens behind the document


def main() -> None:
    """Run the arms and print what they come to."""
    options = _options()
    started, records = time.monotonic(), []
    llm, arm = served(options)
    for number in range(options.first, options.first + options.documents):
        behind = _GIVEN + _SCORED + 8
        document = task_text(options.texts, options.length, options.seed + number, llm.tokenizer, behind=behind)
        text = document.text if options.last is None else _last(document.text, options.last, llm.tokenizer)
        asker = Asker(llm, text)
        asker.read()
        for name in options.arms:
            if arm is not None:
                arm.use(name, 0)
            found = [(task.kind, asker.ask(task.question, task.max_tokens), task) for task in document.tasks]
            scored = [(kind, task.score(answer), answer) for kind, answer, task in found]
            nats = continuation_nats(asker, llm.tokenizer.encode(document.continuation))
            for kind, score, answer in [*scored, ("continuation", nats, "")]:
                records.append({"document": number, "arm": name, "kind": kind, "score": score, "answer": answer})
                with options.out.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
        asker.forget()
        print(f"document {number}: {time.monotonic() - started:.0f} s", flush=True)
    print(json.dumps(summary(records, options)))


def continuation_nats(asker: Asker, ids: list[int]) -> float:
    """Mean negative log-probability of the tokens behind the first ``_GIVEN``, each given those before it."""
    truth = ids[_GIVEN : _GIVEN + _SCORED]
    scores: list[float] = []

    def follow(_: Answers, sequence: Sequence, logits: Tensor, chosen: object) -> tuple[int, TokenLogprob]:
        given = logprob(logits, truth[len(sequence.generated)], 0)
        scores.append(-given.logprob)
        return given.token_id, given

    with mock.patch.object(Answers, "_token", follow):
        asker.go_on(ids[:_GIVEN], len(truth))
    return sum(scores) / len(scores)


def summary(records: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Mean score by arm and kind, with intervals over documents."""
    grouped: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in records:
        grouped[f"{one['arm']}: {one['kind']}"][one["document"]].append(one["score"])
    means = {}
    for name, documents in grouped.items():
        by_document = [sum(scores) / len(scores) for scores in documents.values()]
        means[name] = [sum(by_document) / len(by_document), *bootstrap(by_document)]
        print(f"{name}: {means[name][0]:.3f} ({means[name][1]:.3f} to {means[name][2]:.3f})")
    return {"model": options.model, "length": options.length, "last": options.last, "means": means}


def _last(text: str, count: int, tokenizer: Any) -> str:
    return str(tokenizer.decode(tokenizer.encode(text)[-count:]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="as for pacellm serve")
    add("--texts", type=Path, required=True)
    add("--length", type=int, default=16_000)
    add("--last", type=int, help="only this many tokens of the end are shown")
    add("--budget", type=int, default=4096)
    add("--window", type=int, default=1024)
    add("--documents", type=int, default=8)
    add("--first", type=int, default=0, help="number of the first document, for runs in pieces")
    add("--seed", type=int, default=1500)
    add("--arms", type=lambda text: text.split(","), default=["lexical", "recent", "random"])
    add("--out", type=Path, default=Path("working_memory_tasks.jsonl"))
    parser.set_defaults(rope_scaling=None, max_model_len=None, host_memory=None, session_dir=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
