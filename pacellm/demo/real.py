"""The demo on a real model: prose with facts stated in it, each asked for in a fork of the session that read it.

A model of 135M parameters finds what a sentence says in the words of the question; each fact here has an attribute of
its own, since it mixes up facts that share one.
"""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from pacellm.calibration.file import text
from pacellm.demo.generator import Document, Fact
from pacellm.demo.local import running_server
from pacellm.demo.show import Answer, ask, report_bank
from pacellm.errors import PaceError

ENOUGH = 8  # right answers of the ten that a model of this size is held to
READ = "I have read it."
_FACTS = (
    ("The phone number of the dentist is 48213.", "What is the phone number of the dentist?", "48213"),
    ("The best hotel in Tarnow is the Copper Kettle.", "What is the best hotel in Tarnow?", "Copper Kettle"),
    ("The title of the lost painting is Two Herons.", "What is the title of the lost painting?", "Two Herons"),
    ("The colour of the front door is turquoise.", "What is the colour of the front door?", "turquoise"),
    ("The winner of the chess tournament was Agatha Novak.", "Who was the winner of the chess tournament?", "Novak"),
    ("The price of the blue bicycle is 340 euros.", "What is the price of the blue bicycle?", "340"),
    ("The oldest tree in the park is a chestnut.", "What is the oldest tree in the park?", "chestnut"),
    ("The number of the hotel room is 417.", "What is the number of the hotel room?", "417"),
    ("The favourite fruit of the parrot is mango.", "What is the favourite fruit of the parrot?", "mango"),
    ("The height of the church tower is 63 metres.", "What is the height of the church tower?", "63"),
)  # fmt: skip


def real_document(share: float = 1.0) -> Document:
    """The beginning of the calibration's prose, a ``share`` of its paragraphs, with ten facts as paragraphs between.

    All of it has about 4,000 tokens of SmolLM2's.
    """
    paragraphs = text().strip().split("\n\n")
    paragraphs = paragraphs[: round(share * len(paragraphs))]
    parts = list(paragraphs)
    facts: list[Fact] = []
    for number, (statement, question, answer) in reversed(list(enumerate(_FACTS))):
        place = round((number + 0.5) / len(_FACTS) * len(paragraphs))
        parts.insert(place, statement)
        facts.insert(0, Fact(question, answer, place / len(paragraphs)))
    return Document("\n\n".join(parts), facts)


def conversation(document: Document) -> list[dict[str, str]]:
    """What a session has read before the first question."""
    return [{"role": "user", "content": document.text}, {"role": "assistant", "content": READ}]


def show_real(name: str, path: str, serve_arguments: Sequence[str]) -> int:
    """Run it; returns 0 where at least ``ENOUGH`` answers were right.

    Args:
        name: of the model, as the user wrote it. path: where it lies.
    """
    document = real_document()
    print(f"Starting the server: {' '.join(['pacellm serve', name, *serve_arguments])}", flush=True)
    with running_server([path, *serve_arguments]) as client:
        right = _talk(client, document)
    print(f"\n{right} of {len(document.facts)} answers are right.")
    print(f"\nNow yours: `pacellm serve {name}`, and in another terminal `pacellm chat`.")
    return 0 if right >= ENOUGH else 1


def _talk(client: httpx.Client, document: Document) -> int:
    history = conversation(document)
    print("Reading a text with ten facts in it, as the session `document`", flush=True)
    read = ask(client, history, "document", max_tokens=0, add_generation_prompt=False)
    tokens = read.usage["prompt_tokens"]
    print(f"  {tokens:,} tokens in {read.seconds:.1f} s: {tokens / read.seconds:,.0f} tokens/s", flush=True)
    report_bank(read.pace)
    print("\nEvery question goes to a fork of that session, with its whole history", flush=True)
    right = 0
    for number, fact in enumerate(document.facts, start=1):
        answer = ask_fork(client, history, fact.question, f"question-{number}")
        right += fact.answer in answer.text
        _report(fact, answer)
    return right


def ask_fork(client: httpx.Client, history: list[dict[str, str]], question: str, name: str) -> Answer:
    """Fork the session ``document`` and ask there.

    Raises:
        PaceError: the server answered with an error.
    """
    response = client.post("/v1/sessions/document/fork", json={"session_id": name})
    if response.is_error:
        raise PaceError(f"the server answered {response.status_code}: {response.text}")
    return ask(client, [*history, {"role": "user", "content": question}], name, return_progress=False)


def _report(fact: Fact, answer: Answer) -> None:
    verdict = "right" if fact.answer in answer.text else f"WRONG, it is {fact.answer}"
    cached, total = answer.usage["prompt_tokens_details"]["cached_tokens"], answer.usage["prompt_tokens"]
    print(f"  {fact.question}   (stated at {fact.depth:.0%})")
    print(f"    {' '.join(answer.text.split())}   ({verdict}; {cached:,} of {total:,} tokens in place, "
          f"{answer.seconds:.1f} s)", flush=True)  # fmt: skip
