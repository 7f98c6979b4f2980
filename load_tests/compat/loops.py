"""Questions for tool loops, the functions they are about, and what came of them: shared by all SDKs.

A loop is complete where the SDK ends it by itself with a text; what a model of this size does to it (a call that is cut
at the token limit, an empty answer) is counted. No request may be refused. A call is right where it is of the function
that the question needs, with the arguments that the question names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_TURNS, MAX_TOKENS = 6, 60
Call = tuple[str, dict[str, Any]]


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny, 21 degrees in {city}."


def add(a: float, b: float) -> str:
    """Adds two numbers."""
    return f"{a + b:g}"


def get_time(city: str) -> str:
    """The time in a city."""
    return f"14:35 in {city}"


FUNCTIONS = (get_weather, add, get_time)
# a question, and the call that it needs: None where it needs none
QUESTIONS: tuple[tuple[str, Call | None], ...] = (
    ("What is the weather in Lisbon?", ("get_weather", {"city": "Lisbon"})),
    ("Please add 8 and 13.", ("add", {"a": 8, "b": 13})),
    ("What time is it in Seoul?", ("get_time", {"city": "Seoul"})),
    ("Tell me the weather in Vienna.", ("get_weather", {"city": "Vienna"})),
    ("Use a function to add 250 and 125.", ("add", {"a": 250, "b": 125})),
    ("Is it cold in Moscow today?", ("get_weather", {"city": "Moscow"})),
    ("Tell me the time in Chicago.", ("get_time", {"city": "Chicago"})),
    ("How much is 31 plus 11?", ("add", {"a": 31, "b": 11})),
    ("Who painted the Mona Lisa?", None),
    ("Write a haiku about rain.", None),
    ("Good morning!", None),
    ("What is the capital of Italy?", None),
)


_COUNTED = ("complete", "refused", "called", "right", "left alone")


@dataclass
class Tally:
    """What came of the questions."""

    name: str
    num: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("complete", "refused", "called", "right", "left alone"), 0)
    )

    def run(self, loop: Callable[[str], tuple[list[Call], str]]) -> Tally:
        """Ask every question.

        Args:
            loop: of an SDK: the calls that it made, and the text at its end.
        """
        for question, wanted in QUESTIONS:
            try:
                calls, text = loop(question)
            except Exception as error:  # the loop did not end by itself
                self.num["refused"] += is_refusal(error)
                print(f"{self.name}: {question} -> {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            print(f"{self.name}: {question} -> {calls} {text!r}", flush=True)
            self.num["complete"] += bool(text)
            self.num["called"] += bool(calls)
            self.num["right"] += wanted is not None and wanted in calls
            self.num["left alone"] += wanted is None and not calls
        return self

    def check(self) -> None:
        """No request was refused, most loops are complete, and at least one had a call; the rest is the model's."""
        needed = sum(wanted is not None for _, wanted in QUESTIONS)
        num = self.num
        print(
            f"{self.name}: {num['complete']} of {len(QUESTIONS)} loops complete, {num['refused']} refused, "
            f"{num['called']} with a call; right call {num['right']} of {needed}, none where none was needed "
            f"{num['left alone']} of {len(QUESTIONS) - needed}"
        )
        assert num["refused"] == 0
        assert num["complete"] > len(QUESTIONS) / 2
        assert num["called"] > 0


def is_refusal(error: BaseException | None) -> bool:
    """The server answered with an error, whatever the SDK has wrapped around that."""
    while error is not None:
        if getattr(error, "status_code", None) is not None:
            return True
        error = error.__cause__ or error.__context__
    return False
