"""One document, and what is said behind it or alone with one bank or another in place."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from load_tests.layers.documents import Document
from load_tests.layers.rig import Pass, Rig, branch
from pacellm.config import PAConfig
from pacellm.demo.probe import copies, emptied, overwrite, with_random_values
from pacellm.memory.bank import Bank
from pacellm.memory.effective_rank import effective_rank
from pacellm.memory.state import COUNTERS

OTHERS = ("off", "emptied", "foreign", "random")


@dataclass(frozen=True)
class Turn:
    """Something that is scored behind a document or alone.

    Attributes:
        ids: what is fed. rows: of them, those whose next token is scored. targets: [R] these tokens.
    """

    ids: list[int]
    rows: list[int]
    targets: Tensor


@dataclass
class Scores:
    """Of one way to go on, behind one document: nats per token and what was right.

    Attributes:
        rest: of the prose. answers: of each answer. right: answers that were. found: log-probabilities of each turn.
    """

    rest: float
    answers: list[float]
    right: int
    found: list[Tensor] = field(repr=False)

    def row(self) -> dict[str, Any]:
        """For the log."""
        return {"rest": self.rest, "answers": statistics.mean(self.answers), "right": self.right}


class Bench:
    """One document and what the plain model makes of it.

    Args:
        stride: every which token of the prose is scored.
    """

    def __init__(self, rig: Rig, document: Document, stride: int) -> None:
        self.rig, self.document = rig, document
        self._opening = document.head + document.read
        self._plain_cache = rig.cache()
        self._plain = rig.plain(self._opening, self._plain_cache, [len(self._opening) - 1])
        self._head = rig.cache()
        if document.head:
            rig.plain(document.head, self._head, [0])
        self.turns = [_prose_turn(document.rest, stride)]
        self.turns += [_answer_turn(question, answer) for question, answer in document.asked]
        self._made: dict[bool, list[Pass]] = {}

    def _passes(self, alone: bool) -> list[Pass]:
        """The turns without banks."""
        if alone not in self._made:
            cache = self._head if alone else self._plain_cache
            self._made[alone] = [self.rig.plain(turn.ids, branch(cache), turn.rows) for turn in self.turns]
        return self._made[alone]

    def off(self, alone: bool) -> Scores:
        """Without banks."""
        return self._scores([one.hidden for one in self._passes(alone)])

    def read(self, banks: dict[int, Bank]) -> DynamicCache:
        """Read the document, writing the banks; what attention keeps of it."""
        cache, last = self.rig.cache(), [len(self._opening) - 1]
        self.rig.banked(self._opening, cache, last, banks, self._plain, writes=True)
        return branch(cache, self._plain_cache, min(banks))

    def learn(self, banks: dict[int, Bank]) -> dict[int, Any]:
        """The same for banks alone; their states."""
        self.rig.learn(self._opening, banks, self._plain)
        return {layer: bank.state for layer, bank in banks.items()}

    def go_on(self, banks: dict[int, Bank], cache: DynamicCache | None) -> Scores:
        """The turns with banks that stand still, behind what ``cache`` keeps, or alone."""
        passes = self._passes(cache is None)
        return self._scores(
            [
                self.rig.banked(turn.ids, branch(self._head if cache is None else cache), turn.rows, banks, plain)
                for turn, plain in zip(self.turns, passes, strict=True)
            ]
        )

    def rest_alone(self, banks: dict[int, Bank]) -> float:
        """Nats per token of the prose alone."""
        turn, plain = self.turns[0], self._passes(True)[0]
        found = self.rig.banked(turn.ids, branch(self._head), turn.rows, banks, plain) if banks else plain.hidden
        return loss_of(self.rig.logprobs(found), turn.targets)

    def _scores(self, hidden: list[Tensor]) -> Scores:
        found = list(self.rig.logprobs(torch.cat(hidden)).split([len(turn.rows) for turn in self.turns]))
        losses = [loss_of(one, turn.targets) for one, turn in zip(found, self.turns, strict=True)]
        right = sum(
            one.argmax(-1).tolist() == turn.targets.tolist()
            for one, turn in zip(found[1:], self.turns[1:], strict=True)
        )
        return Scores(losses[0], losses[1:], right, found)


def loss_of(logprobs: Tensor, targets: Tensor) -> float:
    """Nats per token of targets [R] under [R, V]."""
    return -float(logprobs.gather(1, targets[:, None]).double().mean())


def _prose_turn(ids: list[int], stride: int) -> Turn:
    rows = list(range(0, len(ids) - 1, stride))
    return Turn(ids, rows, torch.tensor([ids[row + 1] for row in rows]))


def _answer_turn(question: list[int], answer: list[int]) -> Turn:
    ids = question + answer[:-1]
    return Turn(ids, list(range(len(question) - 1, len(ids))), torch.tensor(answer))


def sweep(rig: Rig, document: Document, todo: list[tuple[PAConfig, int]], stride: int) -> Iterator[dict[str, Any]]:
    """Nats per token of a document's first half behind its first segment, with a bank on one layer while it is read."""
    half = document.head + document.read[: len(document.read) // 2]
    rows = list(range(todo[0][0].segment, len(half) - 1, stride)) if todo else []
    targets = torch.tensor([half[row + 1] for row in rows])
    plain = rig.plain(half, rig.cache(), rows)
    off = loss_of(rig.logprobs(plain.hidden), targets)
    for config, layer in todo:
        found = rig.banked(half, rig.cache(), rows, rig.banks((layer,), config), plain, writes=True)
        yield {"preset": config.preset, "layers": [layer], "own": loss_of(rig.logprobs(found), targets), "off": off}


Measurement = Callable[[Bench, dict[int, Bank], dict[int, Any]], tuple[dict[str, Any], dict[int, Any]]]
"""Empty banks and a foreign document's states to a record and the own states."""


def measure(bench: Bench, banks: dict[int, Bank], foreign: dict[int, Any]) -> tuple[dict[str, Any], dict[int, Any]]:
    """One document with banks on some layers: a record, and the states of its own banks.

    Args:
        banks: empty ones. foreign: the bank states of another document, by layer.
    """
    cache = bench.read(banks)
    states = {layer: bank.state for layer, bank in banks.items()}
    mine = copies(states)
    record: dict[str, Any] = {
        "rank": statistics.mean(effective_rank(bank.keys[: bank.filled]) for bank in banks.values()),
        "filled": statistics.mean(bank.filled for bank in banks.values()),
        "asked": len(bench.document.asked),
    }
    others = {"emptied": emptied(mine), "foreign": foreign, "random": with_random_values(mine, 0)}
    for name, kept in (("behind", cache), ("alone", None)):
        found = {}
        for other, theirs in {"own": mine, **others}.items():
            if kept is None and other == "emptied":
                continue  # to the bit as without banks
            overwrite(states, theirs)
            before = _counts(states)
            found[other] = bench.go_on(banks, kept)
            if name == "behind" and other in ("own", "foreign"):
                record[f"reads {other}"] = _shares(before, _counts(states))
        found["off"] = bench.off(kept is None)
        found.setdefault("emptied", found["off"])
        own = found["own"].found
        kls = {other: _divergences(own, found[other].found) for other in OTHERS}
        record[name] = {
            **{other: scores.row() for other, scores in found.items()},
            "kl rest": {other: kl[0] for other, kl in kls.items()},
            "kl answers": {other: statistics.mean(kl[1:]) for other, kl in kls.items()},
        }
    return record, mine


def measure_each(
    bench: Bench, banks: dict[int, Bank], foreign: dict[int, Any]
) -> tuple[dict[str, Any], dict[int, Any]]:
    """As :func:`measure`, the prose alone with the own and the foreign bank."""
    states = bench.learn(banks)
    mine, record = copies(states), {"own": bench.rest_alone(banks), "off": bench.rest_alone({})}
    overwrite(states, foreign)
    return record | {"foreign": bench.rest_alone(banks)}, mine


def _divergences(own: list[Tensor], others: list[Tensor]) -> list[float]:
    """KL of each turn, in nats per token."""
    return [
        float((mine.exp() * (mine - theirs)).sum(-1, dtype=torch.float64).mean())
        for mine, theirs in zip(own, others, strict=True)
    ]


def _counts(states: dict[int, Any]) -> dict[str, int]:
    return {name: sum(int(state.counters[place]) for state in states.values()) for place, name in enumerate(COUNTERS)}


def _shares(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    reads = {name: after[name] - before[name] for name in ("hits", "fuses", "misses", "empty")}
    return {name: count / sum(reads.values()) for name, count in reads.items()}
