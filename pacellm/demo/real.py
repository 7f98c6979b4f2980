"""The demo on a real model: prose with facts stated in it, each asked for in a fork of the session that read it.

A text that is longer than the model's context is read with working memory. A model of 135M parameters finds what a
sentence says in the words of the question; each fact here has an attribute of its own, since it mixes up facts that
share one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import httpx

from pacellm.calibration.file import text
from pacellm.demo.generator import Document, Fact
from pacellm.demo.library_text import library_text
from pacellm.demo.local import running_server
from pacellm.demo.show import Answer, ask, report_bank
from pacellm.errors import ConfigError, PaceError
from pacellm.text.tokenizer import ChatTokenizer

ENOUGH = 8  # right answers of the ten that a model of this size is held to
BUDGET = 4096  # tokens of a view of a long document
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
    return _with_facts(paragraphs[: round(share * len(paragraphs))])


def long_document(num_tokens: int, tokenizer: ChatTokenizer) -> Document:
    """What Python's library says of itself, ``num_tokens`` of it, with the same ten facts.

    Raises:
        ConfigError: it says less.
    """
    paragraphs: list[str] = []
    counted = 0
    for paragraph in library_text():
        counted += len(tokenizer.encode(paragraph + "\n\n"))
        if counted > num_tokens:
            return _with_facts(paragraphs)
        paragraphs.append(paragraph)
    raise ConfigError(f"the demo has {counted:,} tokens of prose for this model; give at most that", param="tokens")


def _with_facts(paragraphs: list[str]) -> Document:
    parts = list(paragraphs)
    facts: list[Fact] = []
    for number, (statement, question, answer) in reversed(list(enumerate(_FACTS))):
        place = round((number + 0.5) / len(_FACTS) * len(paragraphs))
        parts.insert(place, statement)
        facts.insert(0, Fact(question, answer, place / len(paragraphs)))
    return Document("\n\n".join(parts), facts)


def reading(document: Document) -> list[dict[str, str]]:
    """What a session has read before the first question."""
    return [{"role": "user", "content": document.text}, {"role": "assistant", "content": READ}]


def show_real(name: str, path: str, num_tokens: int | None, serve_arguments: Sequence[str]) -> int:
    """Run it; returns 0 where enough answers were right.

    Args:
        name: of the model, as the user wrote it. path: where it lies.
        num_tokens: of a document for working memory; None is a short one, seen whole.

    Raises:
        ConfigError: there is no such document.
    """
    if num_tokens is None:
        document, flags = real_document(), []
    else:
        print(f"Putting together a text of {num_tokens:,} tokens …", flush=True)
        document, flags = long_document(num_tokens, ChatTokenizer(path)), ["--working-memory", str(BUDGET)]
    print(f"Starting the server: {' '.join(['pacellm serve', name, *flags, *serve_arguments])}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pacellm-demo-") as spare:
        # a history that host memory cannot hold goes there
        where = [] if num_tokens is None else ["--session-dir", spare]
        with running_server([path, *flags, *where, *serve_arguments]) as client:
            answers = _talk(client, document)
            client.delete("/v1/sessions")  # at its end a server writes its sessions out
    right = sum(fact.answer in answer.text for fact, answer in answers)
    found = sum(_is_shown(fact, answer) for fact, answer in answers)
    print(f"\n{right} of {len(answers)} answers are right.", end="")
    print("" if num_tokens is None else f" The fact was among what the model saw in {found}.")
    print(f"\nNow yours: `pacellm serve {' '.join([name, *flags])}`, and in another terminal `pacellm chat`.")
    return 0 if (right if num_tokens is None else found) >= ENOUGH else 1


def _talk(client: httpx.Client, document: Document) -> list[tuple[Fact, Answer]]:
    print("Reading a text with ten facts in it, as the session `document`", flush=True)
    read = ask(client, reading(document), "document", max_tokens=0, add_generation_prompt=False)
    tokens = read.usage["prompt_tokens"]
    print(f"  {tokens:,} tokens in {read.seconds:.1f} s: {tokens / read.seconds:,.0f} tokens/s", flush=True)
    report_bank(read.pace)
    print("\nEvery question goes to a fork of that session", flush=True)
    answers = []
    for number, fact in enumerate(document.facts, start=1):
        answer = ask_fork(client, fact.question, f"question-{number}")
        answers.append((fact, answer))
        _report(fact, answer)
    return answers


def ask_fork(client: httpx.Client, question: str, name: str) -> Answer:
    """Fork the session ``document`` and ask there: the question is appended to its history.

    Raises:
        PaceError: the server answered with an error.
    """
    response = client.post("/v1/sessions/document/fork", json={"session_id": name})
    if response.is_error:
        raise PaceError(f"the server answered {response.status_code}: {response.text}")
    messages = [{"role": "user", "content": question}]
    return ask(client, messages, name, return_progress=False, pacellm={"append": True})


def _report(fact: Fact, answer: Answer) -> None:
    verdict = "right" if fact.answer in answer.text else f"WRONG, it is {fact.answer}"
    cached, total = answer.usage["prompt_tokens_details"]["cached_tokens"], answer.usage["prompt_tokens"]
    print(f"  {fact.question}   (stated at {fact.depth:.0%})")
    print(f"    {' '.join(answer.text.split())}   ({verdict}; {cached:,} of {total:,} tokens in place, "
          f"{answer.seconds:.1f} s)", flush=True)  # fmt: skip
    for passage in _passages(answer)[:1]:
        said = " ".join(passage["text"].split())
        print(f"    called back: tokens {passage['start']:,} to {passage['end']:,}: … {said[:300]} …", flush=True)


def _passages(answer: Answer) -> list[dict[str, Any]]:
    return (answer.pace.get("memory") or {}).get("passages", [])


def _is_shown(fact: Fact, answer: Answer) -> bool:
    """The fact is in a passage that was called back."""
    return any(fact.answer in passage["text"] for passage in _passages(answer))
