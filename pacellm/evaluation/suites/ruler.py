"""RULER (arXiv 2404.06654), from what its own ``prepare.py`` wrote; its ``evaluate.py`` reads what comes out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pacellm.errors import ConfigError
from pacellm.evaluation.records import Records
from pacellm.evaluation.samples import Prompt, Sample
from pacellm.evaluation.scoring import any_found, parts_found
from pacellm.evaluation.suites.lines import digest, read_at, read_lines

MAX_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Of an answer, by the task's first word, as published."""
_FIELDS = ("index", "input", "outputs", "length")


@dataclass
class Ruler:
    """``TASK/validation.jsonl`` of a folder, or of its folders by length.

    Attributes:
        repeats: samples of each task, the first ones; None is all.
        tasks: only these; empty is all.
        max_tokens: of an answer; None is as published.
    """

    folder: Path
    repeats: int | None
    tasks: Sequence[str] = ()
    max_tokens: int | None = None
    name: str = field(default="ruler", init=False)

    def __post_init__(self) -> None:
        files = sorted(self.folder.glob("**/validation.jsonl"), key=lambda path: (_length(path) or 0, path))
        self._files = [path for path in files if not self.tasks or path.parent.name in self.tasks]
        if not self._files:
            raise ConfigError(f"{self.folder} has no TASK/validation.jsonl that is asked for; RULER's prepare.py "
                              "writes them", param="data")  # fmt: skip
        if missing := sorted(set(self.tasks) - {path.parent.name for path in self._files}):
            raise ConfigError(f"{self.folder} has no {', '.join(missing)}/validation.jsonl", param="tasks")
        places = [(path.parent.name, _length(path)) for path in self._files]
        if len(set(places)) < len(places):
            raise ConfigError(f"{self.folder} has a task twice at one length; name folders by lengths, as 4096/TASK",
                              param="data")  # fmt: skip
        for path in self._files:
            _published_tokens(path)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What prompts depend on."""
        return {"max_tokens": self.max_tokens}

    def samples(self) -> Iterator[Sample]:
        """As the files have them."""
        for path in self._files:
            task, length, about = path.parent.name, _length(path), {"file": digest(path)}
            max_tokens = self.max_tokens or _published_tokens(path)
            for start, line in islice(read_lines(path, _FIELDS), self.repeats):
                name = str(line["index"])
                yield Sample(task, length, name, f"{task}-{length}-{name}", max_tokens,
                             partial(_prompt, path, start), about=about)  # fmt: skip

    def write_predictions(self, records: Records, arms: Sequence[str], target: Path) -> None:
        """What ``evaluate.py --data_dir target/ARM`` reads; behind a folder of a length, ``target/ARM/LENGTH``."""
        for arm in arms:
            for path in self._files:
                task, length = path.parent.name, _length(path)
                written = target / arm / path.relative_to(self.folder).parent.parent / f"{task}.jsonl"
                written.parent.mkdir(parents=True, exist_ok=True)
                with written.open("w", encoding="utf-8") as file:
                    for _, line in islice(read_lines(path, _FIELDS), self.repeats):
                        record = records.found.get((task, length, str(line["index"]), arm))
                        if record is not None and "refused" not in record:
                            told = {"others": {}, "truncation": -1, **line, "pred": record["text"]}
                            file.write(json.dumps(told, ensure_ascii=False) + "\n")


def _prompt(path: Path, start: int) -> Prompt:
    line = read_at(path, start)
    outputs = [str(one) for one in line["outputs"]]
    score = any_found if path.parent.name.startswith("qa") else parts_found
    return Prompt(line["input"], lambda answer: score(_printable(answer), outputs))


def _printable(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def _length(path: Path) -> int | None:
    """What the folder of the task's folder is called, where that is a number."""
    name = path.parent.parent.name
    return int(name) if name.isdecimal() else None


def _published_tokens(path: Path) -> int:
    kind = path.parent.name.split("_")[0]
    if kind not in MAX_TOKENS:
        raise ConfigError(f"{path} is of none of RULER's tasks ({', '.join(MAX_TOKENS)}, with _ and more behind)",
                          param="data")  # fmt: skip
    return MAX_TOKENS[kind]
