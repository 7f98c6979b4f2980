"""Texts of clients kept apart from what a chat template writes: special tokens in them are ordinary text.

Before the template sees a client's text, each special token in it gets a joint, a character of no language, behind its
first character. So whatever the template does with the text (trim, cut, lower, write as JSON, compare), the special
tokens in it are none of the template's own. Once the prompt is rendered, the template's are exchanged for aliases, the
joints are dropped, and the whole is encoded in one go by a second tokenizer, which knows the aliases as tokens and the
special tokens as text: everything else, merges at boundaries included, is as the first tokenizer has it.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from pacellm.errors import ModelError, RequestError
from pacellm.text.pieces import PieceMemo, Pieces, pattern_of

# noncharacters: Unicode keeps them for such use, and texts do not have them; those that do keep theirs (_ESCAPE)
_JOINT, _OWN, _ESCAPE, _ALIAS = _RESERVED = "\ufdd0\ufdd1\ufdd2\ufdd3"
_FIRST_ALIAS = 0x100000
_ESCAPED = re.compile(f"{_ESCAPE}([0-2]|3(?![{chr(_FIRST_ALIAS)}-\U0010ffff]))")  # all but what looks like an alias
_WITHIN = "\x02"  # no tokenizer joins it to what follows
_CONTROLS = {"<s>": 1, "</s>": 2}  # sentencepiece's, which not every model's files call special
_MAX_READINGS = 4  # times that a prompt's text is encoded to compare it with a session's log


def structure_of(backend: Tokenizer, named: Iterable[str], template: str) -> dict[int, AddedToken]:
    """The tokens that are no text, by id: special ones, and added ones that the chat template writes or that the
    model's vocabulary lacks (``<think>``, ``<tool_call>``). White space and other text that is added for its own sake
    (``<table>`` of Gemma) is text.

    Args:
        named: those with a role in the tokenizer's configuration, as the end of a text.
        template: the chat template's source.
    """
    vocabulary, roles = backend.get_vocab(with_added_tokens=False), set(named)

    def is_structure(number: int, token: AddedToken) -> bool:
        text = token.content
        if len(text) < 2 or not text.strip("▁ \t\r\n"):
            return False
        is_foreign = text not in vocabulary or _CONTROLS.get(text) == number
        return token.special or text in roles or is_foreign or text in template

    added = backend.get_added_tokens_decoder()
    return {number: token for number, token in added.items() if is_structure(number, token)}


class Literals:
    """Keeps clients' texts apart for one tokenizer.

    Args:
        backend: the fast tokenizer's.
        structure: the tokens that are no text, by id.
        memo: remembers long pieces.
    """

    def __init__(self, backend: Tokenizer, structure: dict[int, AddedToken], memo: PieceMemo) -> None:
        self._backend, self._structure, self._memo = backend, structure, memo
        texts = [token.content for token in structure.values()]
        self._ids = {token.content: number for number, token in structure.items()}
        # a template may change the case of what it is given
        self._said = re.compile(pattern_of(texts), re.IGNORECASE)
        self._written = re.compile(pattern_of(texts))
        self._own = re.compile(pattern_of(text[0] + _OWN + text[1:] for text in texts))
        self._begun = {text[:end].lower() for text in texts for end in range(1, len(text))}
        self._first = re.compile(f"[{re.escape(''.join({text[0] for text in texts}))}]" if texts else "(?!)")
        self._longest = max(map(len, texts), default=1)
        is_normalized = any(token.normalized for token in structure.values())
        self._normalizer = backend.normalizer if is_normalized else None

    # -- before the template -----------------------------------------------------------------------------------

    def shielded(self, text: str, *, own: bool = False) -> str:
        """A client's text for the template; mostly the same.

        Args:
            own: it may repeat what the model has generated.
        """
        joint = _OWN if own else _JOINT
        if any(character in text for character in _RESERVED):
            text = re.sub(f"[{_RESERVED}]", lambda found: _ESCAPE + str(_RESERVED.index(found[0])), text)
        text = text.replace("\\ufdd", f"\\{_JOINT}ufdd")  # what a joint would be in ASCII
        text, count = self._said.subn(lambda found: found[0][0] + joint + found[0][1:], text)
        if not count and self._normalizer is not None:
            normal = self._normalizer.normalize_str(text.encode("utf-8", "replace").decode())
            if self._said.search(normal):
                text = re.sub(r"\S", lambda found: found[0] + _JOINT, text, count=1)  # so that it is kept apart
        return self._closed(text)

    def _closed(self, text: str) -> str:
        """A text at whose end no special token begins that what follows might end."""
        rest = text[-self._longest :]
        starts = [found.end() for found in self._first.finditer(rest) if rest[found.start() :].lower() in self._begun]
        for start in reversed(starts):
            rest = rest[:start] + _JOINT + rest[start:]
        return text[: -self._longest] + rest if starts else text

    def shielded_answer(self, text: str, marks: tuple[str, str] | None, *, is_open: bool = False) -> str:
        """The same for what the model may have generated.

        Args:
            marks: of reasoning, which the text may begin with, where they are the template's to find.
            is_open: reasoning need not end.
        """
        begin, end = marks or ("", "")
        head, closing, rest = text.partition(end) if end else (text, "", "")
        lead, opening, body = head.partition(begin) if begin and begin in head else ("", "", head)
        is_reasoned = not lead.strip() and (closing or (is_open and opening))
        if not is_reasoned or _any_in((begin, end), (body, rest)):
            return self.shielded(text, own=True)
        return lead + opening + self.shielded(body, own=True) + closing + self.shielded(rest, own=True)

    def shielded_value(self, value: Any) -> Any:
        """The same for every string in a JSON value."""
        match value:
            case str():
                return self.shielded(value)
            case dict():
                return {self.shielded(key): self.shielded_value(below) for key, below in value.items()}
            case list():
                return [self.shielded_value(below) for below in value]
        return value

    # -- after it ----------------------------------------------------------------------------------------------

    def encode(
        self, rendered: str, scope: str | None, logged: array[int] | None, *, limit: int | None = None
    ) -> list[int]:
        """Ids of a prompt that was rendered from shielded texts.

        Args:
            scope, limit: as for :meth:`PieceMemo.encode`.
            logged: what the prompt's session has fed and generated so far.

        Raises:
            RequestError: the template has changed joints.
        """
        if "\\ufdd" in rendered:
            raise RequestError(
                "the model's chat template escapes characters, so special tokens in texts cannot be kept apart",
                param="messages",
            )
        if not any(character in rendered for character in _RESERVED):
            return self._memo.encode(rendered, scope, limit=limit)
        if logged is not None and _OWN in rendered:
            rendered = self._as_logged(rendered, scope, logged)
        return self._apart(rendered, scope, limit)

    def has_own(self, rendered: str) -> bool:
        """There are special tokens in texts that repeat what the model may have generated."""
        return _OWN in rendered

    def _apart(self, rendered: str, scope: str | None, limit: int | None = None) -> list[int]:
        text = self._written.sub(lambda found: self._second.aliases[found[0]], rendered)
        text = text.replace(_JOINT, "").replace(_OWN, "")
        text = _ESCAPED.sub(lambda found: _RESERVED[int(found[1])], text)
        return self._second.ids(self._memo, text, scope, limit)

    def _as_logged(self, rendered: str, scope: str | None, logged: array[int]) -> str:
        """The prompt, with those of the model's own special tokens restored that its session's log has in their
        place. What is too much to compare stays text."""
        known, at, start = "", 0, 0  # text that agrees with the log's first ids; how many; where the rest begins
        left = _MAX_READINGS * len(rendered)
        for found in self._own.finditer(rendered):
            before = rendered[start : found.start()]
            left -= len(before) if self._memo.is_exact else len(known) + len(before)
            if left < 0:
                break
            ids = self._apart(before if self._memo.is_exact else known + before, scope)
            place = at + len(ids) if self._memo.is_exact else len(ids)
            text = found[0].replace(_OWN, "")
            expected = logged[place - len(ids) : place]
            if len(logged) > place and logged[place] == self._ids[text] and expected == array("i", ids):
                known, at, start = known + before + text, place + 1, found.end()
            elif expected[: -self._longest] != array("i", ids[: -self._longest]):
                break  # the prompt has left the log before this
        return known + rendered[start:]

    @cached_property
    def _second(self) -> _Second:
        """Made when first needed: as large as the tokenizer, and seconds for a large one."""
        return _Second(self._backend, self._structure)


def _any_in(marks: tuple[str, str], texts: tuple[str, str]) -> bool:
    return any(mark in text for mark in marks for text in texts)


class _Second:
    """The tokenizer that has aliases for tokens that are no text, and those as text.

    Raises:
        ModelError: its other tokens would not be the first one's.
    """

    def __init__(self, backend: Tokenizer, structure: dict[int, AddedToken]) -> None:
        self._first, self._texts = backend, {number: token.content for number, token in structure.items()}
        self.aliases = {text: _ALIAS + chr(_FIRST_ALIAS + place) for place, text in enumerate(self._texts.values())}
        escape = _ESCAPE + str(_RESERVED.index(_ALIAS))
        second = self._build(structure, escape)
        self._pieces = Pieces(second, [*self.aliases.values(), escape])
        meaning = {self.aliases[text]: [number] for number, text in self._texts.items()}
        meaning[escape] = self._spelled(_ALIAS)
        vocabulary = {token.content: number for number, token in second.get_added_tokens_decoder().items()}
        self._meaning = {vocabulary[text]: ids for text, ids in meaning.items()}

    def _build(self, structure: dict[int, AddedToken], escape: str) -> Tokenizer:
        description = json.loads(self._first.to_str())
        known = description["added_tokens"]
        aliased = [{**token, "content": self.aliases[token["content"]]} for token in known if token["id"] in structure]
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in known:
            token["special"] = token["id"] in structure  # what is special here is not looked for
        start = self._first.get_vocab_size(with_added_tokens=True)
        more = [
            {**token, "id": start + place, "special": False}
            for place, token in enumerate([*aliased, {"content": escape, **plain}])
        ]
        second = Tokenizer.from_str(json.dumps({**description, "added_tokens": known + more}))
        if any(second.token_to_id(token["content"]) != token["id"] for token in known):
            raise ModelError("the tokenizer cannot be told to read its special tokens as text")
        second.encode_special_tokens = True
        return second

    def ids(self, memo: PieceMemo, text: str, scope: str | None, limit: int | None = None) -> list[int]:
        """Ids of a text with aliases, as the first tokenizer has them."""
        ids = memo.encode(text, scope, self._pieces, limit=limit)
        leaked = self._texts.keys() & set(ids)  # some vocabularies have them as text
        meaning = self._meaning | {number: self._spelled(self._texts[number]) for number in leaked}
        found: list[int] = []
        start = 0
        for place in np.flatnonzero(np.isin(ids, list(meaning))).tolist():
            found += ids[start:place]
            found += meaning[ids[place]]
            start = place + 1
        return found + ids[start:]

    def _spelled(self, text: str) -> list[int]:
        """Ids of a text's characters, each by itself, within a text."""
        ids: list[int] = []
        before = self._first.encode(_WITHIN, add_special_tokens=False).ids
        for character in text:
            whole = self._first.encode(_WITHIN + character, add_special_tokens=False).ids
            ids += whole[len(before) :] if whole[: len(before)] == before else whole
        return ids
