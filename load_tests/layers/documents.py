"""Documents of prose with facts in them, from a folder."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

NAMES = (
    "Marlow",
    "Tessaly",
    "Quillon",
    "Ardenvale",
    "Bramwick",
    "Corvane",
    "Delhurst",
    "Elmstead",
    "Fennimore",
    "Galt",
)
OPENING = "The access code of the {} archive is"
HEADER = 2000
"""Characters at the start of a file that are left out: titles and tables of contents."""


@dataclass(frozen=True)
class Document:
    """A stretch of prose, as ids.

    Attributes:
        name: file and number of the stretch.
        head: what the model sees before a document or a question. read: the document with its facts.
        rest: how its prose goes on. asked: (question up to the answer, answer) of each fact.
    """

    name: str
    head: list[int]
    read: list[int]
    rest: list[int]
    asked: list[tuple[list[int], list[int]]]


class Library:
    """Documents from a folder of prose, kinds in turn.

    Args:
        tokens: of a document's first part, facts included. rest: tokens behind it. questions: facts in it.
    """

    def __init__(self, model: str, folder: Path, tokens: int, rest: int, questions: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        self._folder, self._tokens, self._rest, self._questions = folder, tokens, rest, questions

    def documents(self, count: int) -> list[Document]:
        """The first ``count``: kinds in turn, every file's first stretch before any file's second.

        Raises:
            SystemExit: the folder has fewer.
        """
        kinds = [self._stretches(kind) for kind in sorted(self._folder.iterdir()) if kind.is_dir()]
        found: list[Document] = []
        while kinds and len(found) < count:
            kind = kinds.pop(0)
            if (stretch := next(kind, None)) is not None:
                found.append(self._document(*stretch, seed=len(found)))
                kinds.append(kind)
        if len(found) < count:
            raise SystemExit(
                f"{self._folder} has text for {len(found)} documents of {self._tokens} tokens, not {count}"
            )
        return found

    def _stretches(self, kind: Path) -> Iterator[tuple[str, list[int]]]:
        size = self._tokens + self._rest
        files = [(path.stem, self._ids(_prose(path))) for path in sorted(kind.glob("*.txt"))]
        for number in range(max((len(ids) // size for _, ids in files), default=0)):
            for name, ids in files:
                if len(ids) >= (number + 1) * size:
                    yield f"{kind.name}/{name}.{number}", ids[number * size : (number + 1) * size]

    def _document(self, name: str, prose: list[int], seed: int) -> Document:
        rng = random.Random(seed)
        facts = [(who, f" {rng.randrange(10_000, 100_000)}") for who in rng.sample(NAMES, self._questions)]
        told = [self._ids(f" {OPENING.format(who)}{code}.") for who, code in facts]
        room = self._tokens - sum(map(len, told))
        ids: list[int] = []
        for number, fact in enumerate(told):
            end = self._sentence_end(prose, int((number + 0.5) * room / len(told)), room)
            ids += prose[len(ids) - sum(map(len, told[:number])) : end] + fact
        ids += prose[len(ids) - sum(map(len, told)) : room]
        head, asked = self._frames([who for who, _ in facts])
        answers = [self._ids(code) for _, code in facts]
        return Document(name, head, ids, prose[room : room + self._rest], list(zip(asked, answers, strict=True)))

    def _frames(self, names: list[str]) -> tuple[list[int], list[list[int]]]:
        """What stands before a document, and behind it up to the answer, for each name."""
        if not self._tokenizer.chat_template:
            asked = "\n\nQuestion: What is the access code of the {} archive?\nAnswer: "
            return self._tokenizer.encode(""), [self._ids((asked + OPENING).format(who, who)) for who in names]
        heads, tails = set(), []
        for who in names:
            content = f"<DOCUMENT>\n\nWhat is the access code of the {who} archive?"
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            head, tail = text.split("<DOCUMENT>")
            heads.add(head)
            tails.append(self._ids(tail + OPENING.format(who)))
        return self._ids(heads.pop()), tails

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _sentence_end(self, ids: list[int], start: int, stop: int) -> int:
        """The place behind the next full stop, or ``start`` where there is none before ``stop``."""
        for place in range(start, stop):
            if self._tokenizer.decode([ids[place]]).endswith("."):
                return place + 1
        return start


def _prose(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="ignore")[HEADER:]
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())
