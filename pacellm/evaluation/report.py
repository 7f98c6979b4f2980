"""Answers to tables: scores with intervals, and each arm against the one that others are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pacellm.evaluation.arms import baseline
from pacellm.evaluation.statistics import Mean, bootstrap, holm, mean_of_tasks, sign_flip

ALL = "all"
"""The row of means over tasks."""
Place = tuple[str, int | None]
"""Task and length: a task of the table."""


@dataclass(frozen=True)
class Row:
    """One arm on one task.

    Attributes:
        answered: samples that have an answer.
        refused: samples that have none.
        message: why, of the first.
        prompt_tokens: as the server counted them, on average; None where it does not.
        score, agreement: from 0 to 1; agreement is the share of answers that are those of the other arm, to the letter.
        difference: of scores, this arm less the other, on samples that both answered.
        p: of the difference, Holm-corrected over the tasks.
    """

    task: str
    length: int | None
    arm: str
    answered: int
    refused: int
    message: str | None
    prompt_tokens: float | None
    score: Mean | None
    agreement: float | None = None
    difference: Mean | None = None
    p: float | None = None


def rows(records: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[Row]:
    """By task, length and arm; with several tasks, their means at the end.

    Args:
        records: one for each sample and arm, in the samples' order.
        arms: their names.
    """
    other = baseline(arms)
    tasks: dict[Place, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for record in records:
        by_arm = tasks.setdefault((record["task"], record["length"]), {arm: {} for arm in arms})
        by_arm[record["arm"]][record["sample"]] = record
    found = [_row(place, arm, by_arm, other) for place, by_arm in tasks.items() for arm in arms]
    for arm in arms:
        tested = [index for index, row in enumerate(found) if row.arm == arm and row.p is not None]
        for index, p in zip(tested, holm([found[index].p or 0.0 for index in tested]), strict=True):
            found[index] = replace(found[index], p=p)
    if len(tasks) > 1:
        found += [_mean_row(arm, tasks.values(), other) for arm in arms]
    return found


def table(found: Sequence[Row], other: str) -> str:
    """For people; scores in percent.

    Args:
        other: the arm that others are compared with. An interval of one document is ``[?]``.
    """
    head = ("task", "length", "arm", "n", "score [95 %]", f"same as {other}", f"less {other} [95 %]", "p (Holm)")
    lines = [head, *(_cells(row, other) for row in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    messages: dict[tuple[str, str], int] = defaultdict(int)
    for row in found:
        if row.message is not None and row.task != ALL:
            messages[row.arm, row.message] += row.refused
    text += [f"{arm}: {count} without an answer: {message}" for (arm, message), count in messages.items()]
    return "\n".join(text)


def _cells(row: Row, other: str) -> tuple[str, ...]:
    is_other = row.arm == other
    return (
        row.task,
        "" if row.length is None else f"{row.length:,}",
        row.arm,
        f"{row.answered}" + (f" (+{row.refused} refused)" if row.refused else ""),
        "–" if row.score is None else _percent(row.score, ""),
        "" if is_other else "–" if row.agreement is None else f"{100 * row.agreement:.0f} %",
        "" if is_other else "–" if row.difference is None else _percent(row.difference, "+"),
        "" if row.p is None else f"{row.p:.3f}",
    )


def _percent(mean: Mean, sign: str) -> str:
    value, low, high = (f"{100 * one:{sign}.1f}" for one in (mean.value, mean.low, mean.high))
    return f"{value} [{low}, {high}]" if mean.documents > 1 else f"{value} [?]"


def _row(place: Place, arm: str, by_arm: Mapping[str, Mapping[str, Mapping[str, Any]]], other: str) -> Row:
    asked, answered = by_arm[arm], _answered(by_arm[arm])
    scores = _by_document(answered.values(), lambda record: record["score"])
    tokens = [record["prompt_tokens"] for record in answered.values() if record.get("prompt_tokens") is not None]
    messages = [record["refused"]["message"] for record in asked.values() if "refused" in record]
    row = Row(
        *place, arm, len(answered), len(messages), messages[0] if messages else None,
        sum(tokens) / len(tokens) if tokens else None, bootstrap(scores) if scores else None,
    )  # fmt: skip
    differences = _differences(by_arm, arm, other)
    if arm == other or not differences:
        return row
    return replace(row, agreement=_agreement(by_arm, arm, other), difference=bootstrap(differences),
                   p=sign_flip(differences))  # fmt: skip


def _mean_row(arm: str, tasks: Iterable[Mapping[str, Mapping[str, Mapping[str, Any]]]], other: str) -> Row:
    """Over tasks that have answers; of agreement and difference, over those that both arms answered."""
    tasks = list(tasks)
    scores = [one for by_arm in tasks
              if (one := _by_document(_answered(by_arm[arm]).values(), lambda record: record["score"]))]  # fmt: skip
    differences = [one for by_arm in tasks if (one := _differences(by_arm, arm, other))]
    agreements = [same for by_arm in tasks if (same := _agreement(by_arm, arm, other)) is not None]
    answered = sum(len(_answered(by_arm[arm])) for by_arm in tasks)
    asked = sum(len(by_arm[arm]) for by_arm in tasks)
    row = Row(ALL, None, arm, answered, asked - answered, None, None, mean_of_tasks(scores) if scores else None)
    if arm == other or not differences:
        return row
    return replace(row, agreement=sum(agreements) / len(agreements), difference=mean_of_tasks(differences))


def _answered(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {sample: record for sample, record in records.items() if "refused" not in record}


def _by_document(
    records: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        found[record["document"]].append(value(record))
    return found


def _differences(by_arm: Mapping[str, Mapping[str, Mapping[str, Any]]], arm: str, other: str) -> dict[str, list[float]]:
    one, against = _answered(by_arm[arm]), _answered(by_arm[other])
    both = [sample for sample in one if sample in against]
    return _by_document(
        (one[sample] for sample in both), lambda record: record["score"] - against[record["sample"]]["score"]
    )


def _agreement(by_arm: Mapping[str, Mapping[str, Mapping[str, Any]]], arm: str, other: str) -> float | None:
    one, against = _answered(by_arm[arm]), _answered(by_arm[other])
    same = [one[sample]["text"] == against[sample]["text"] for sample in one if sample in against]
    return sum(same) / len(same) if same else None
