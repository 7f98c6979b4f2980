"""LongBench (arXiv 2308.14508), from its published JSON lines, with its prompts, lengths of answers and metrics.

``longbench.json`` beside has the prompts and lengths of LongBench's ``config/`` (its license: ``longbench.LICENSE``).
As published, few-shot and code tasks are texts to go on with, other prompts are messages; what is too long loses its
middle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from pacellm.errors import ConfigError
from pacellm.evaluation import scoring
from pacellm.evaluation.samples import Prompt, Sample
from pacellm.evaluation.suites.lines import digest, read_at, read_lines
from pacellm.evaluation.tokens import CHARACTERS, Tokens

_METRICS: dict[str, Callable[[str, str], float]] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
                    scoring.qa_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), scoring.rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), scoring.rouge_l_chinese),
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh"), scoring.paragraph),
    **dict.fromkeys(("lcc", "repobench-p"), scoring.code_similarity),
    "multifieldqa_zh": scoring.qa_f1_chinese,
    "passage_count": scoring.number_share,
}  # fmt: skip
_CLASSES = ("trec", "lsht")
_CHINESE = ("multifieldqa_zh", "dureader", "vcsum")
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
_RAW = (*_FIRST_LINE, "lcc", "repobench-p")
_FIELDS = ("input", "context", "answers", "all_classes", "_id")


@dataclass
class LongBench:
    """``TASK.jsonl`` of a folder; LongBench-E's are ``TASK_e.jsonl``.

    Attributes:
        limit: tokens of prompt and answer; longer prompts lose their middle. None leaves them whole.
        repeats: samples of each task, the first ones; None is all.
        tasks: only these files' names; empty is all.
        max_tokens: of an answer; None is as published.
    """

    folder: Path
    tokens: Tokens
    limit: int | None
    repeats: int | None
    tasks: Sequence[str] = ()
    max_tokens: int | None = None
    name: str = field(default="longbench", init=False)

    def __post_init__(self) -> None:
        files = {path.stem: path for path in sorted(self.folder.glob("*.jsonl"))}
        wanted = self.tasks or files
        self._files = {name: path for name, path in files.items()
                       if name in wanted and name.removesuffix("_e") in published()}  # fmt: skip
        if missing := sorted(set(self.tasks) - set(self._files)):
            raise ConfigError(f"{self.folder} has no {', '.join(missing)} (.jsonl) of LongBench", param="tasks")
        if not self._files:
            raise ConfigError(f"{self.folder} has no files of LongBench's, as narrativeqa.jsonl", param="data")
        if any(name.removesuffix("_e") in _CHINESE for name in self._files):
            scoring.check_chinese()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What prompts depend on."""
        return {"max_tokens": self.max_tokens, "counted": self.tokens.is_exact}

    def samples(self) -> Iterator[Sample]:
        """As the files have them."""
        for name, path in self._files.items():
            task = name.removesuffix("_e")
            max_tokens = self.max_tokens or published()[task]["max_tokens"]
            about = {"file": digest(path)}
            for start, line in islice(read_lines(path, _FIELDS), self.repeats):
                yield Sample(
                    name, self.limit, str(line["_id"]), f"{name}-{line['_id']}", max_tokens,
                    partial(self._prompt, path, start, task, max_tokens),
                    is_raw=task in _RAW, about=about,
                )  # fmt: skip

    def _prompt(self, path: Path, start: int, task: str, max_tokens: int) -> Prompt:
        line = read_at(path, start)
        answers, classes = line["answers"], line["all_classes"] or ()
        text = published()[task]["prompt"].format(context=line["context"], input=line["input"])
        if self.limit is not None:
            around = 0 if task in _RAW else self.tokens.template()
            text = self._cut(text, self.limit - max_tokens - around)
        return Prompt(text, lambda answer: score(task, answer, answers, classes))

    def _cut(self, text: str, limit: int) -> str:
        """At most so many tokens, its beginning and its end, half of them each."""
        if self.tokens.count(text) <= limit:
            return text

        def take(characters: int) -> str:
            half = min(characters, len(text)) // 2
            return text[:half] + text[len(text) - half :]

        most = self.tokens.most(take, limit, CHARACTERS * limit) if limit > 0 else 0
        if most == 0:
            raise ConfigError(f"{self.limit} tokens are too few for an answer and its question", param="lengths")
        return take(most)


def score(task: str, text: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """An answer's, the best over the right ones, from 0 to 1."""
    if task in _FIRST_LINE:
        text = text.lstrip("\n").split("\n")[0]
    if task in _CLASSES:
        return max((scoring.classification(text, one, classes) for one in answers), default=0.0)
    return max((_METRICS[task](text, one) for one in answers), default=0.0)


@cache
def published() -> dict[str, Any]:
    """By task: ``prompt`` and ``max_tokens``."""
    return json.loads(Path(__file__).with_name("longbench.json").read_text(encoding="utf-8"))
