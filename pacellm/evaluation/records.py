"""The file of answers: a line of what was asked for, then one for each answer or refusal."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pacellm.errors import ConfigError
from pacellm.evaluation.arms import Arm
from pacellm.evaluation.samples import Sample

Key = tuple[str, int | None, str, str]
"""Task, length, sample, arm."""


class Records:
    """Answers of a run, kept line by line; a run that finds them goes on.

    Args:
        path: of the file, made where it is not there.
        head: what answers depend on: suite, settings, model.

    Raises:
        ConfigError: the file is of another run, or cannot be used.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path, self._lock = path, threading.Lock()
        self.found: dict[Key, dict[str, Any]] = {}
        plain_head = json.loads(json.dumps(head))
        try:
            lines = self._read()
            self._file = path.open("a", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be used for answers: {error}", param="out") from None
        if not lines:
            self._write(plain_head)
        elif lines[0] != plain_head:
            self.close()
            differs = ", ".join(name for name in _flat(plain_head) | _flat(lines[0])
                                if _flat(plain_head).get(name) != _flat(lines[0]).get(name))  # fmt: skip
            raise ConfigError(f"{path} holds answers of another run, with other {differs}; give another --out",
                              param="out")  # fmt: skip
        for line in lines[1:]:
            self.found[line["task"], line["length"], line["sample"], line["arm"]] = line

    def check_arms(self, arms: Sequence[Arm]) -> None:
        """Refuse an arm that means something else than in the file.

        Raises:
            ConfigError: there is one.
        """
        fields = {record["arm"]: record["fields"] for record in self.found.values() if "refused" not in record}
        for arm in arms:
            if fields.get(arm.name, dict(arm.fields)) != dict(arm.fields):
                raise ConfigError(f"{self.path} holds answers of another arm {arm.name}, with "
                                  f"{json.dumps(fields[arm.name])}; name this one otherwise, or give another --out",
                                  param="arm")  # fmt: skip

    def is_answered(self, sample: Sample, arm: Arm) -> bool:
        """It need not be asked; what was refused is asked again.

        Raises:
            ConfigError: what was answered is another sample of that name.
        """
        record = self.found.get((*sample.key, arm.name))
        if record is None or "refused" in record:
            return False
        if any(record.get(name) != value for name, value in sample.about.items()):
            raise ConfigError(f"{self.path} holds answers to another {sample.task} than is there now; give another "
                              "--out", param="out")  # fmt: skip
        return True

    def add(self, sample: Sample, arm: Arm, told: Mapping[str, Any]) -> None:
        """Keep an answer, or a refusal."""
        record = {
            "task": sample.task,
            "length": sample.length,
            "sample": sample.name,
            "document": sample.document,
            **sample.about,
            "arm": arm.name,
            "fields": dict(arm.fields),
            **({} if arm.url is None else {"url": arm.url}),
            **told,
        }
        with self._lock:
            self._write(record)
            self.found[(*sample.key, arm.name)] = record

    def of(self, samples: Sequence[Sample], arms: Sequence[Arm]) -> list[dict[str, Any]]:
        """Those of these samples and arms, in the samples' order."""
        keys = ((*sample.key, arm.name) for sample in samples for arm in arms)
        return [self.found[key] for key in keys if key in self.found]

    def close(self) -> None:
        """Nothing is added any more."""
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; one that was cut is taken off."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines() if line.strip()]

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def _flat(head: Mapping[str, Any]) -> dict[str, Any]:
    return {**head, **head.get("settings", {}), "settings": None}
