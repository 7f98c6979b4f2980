"""The pieces of an answer to one or several prompts as text_completion chunks, and these added up to one answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from pacellm.errors import PaceError
from pacellm.text.tokenizer import ChatTokenizer
from pacellm.types import Finished, GenerationRequest, TokenLogprob

from ... import sse
from ...errors import body_of
from ...writing.answer import Chunk, Ended, Part, Said
from ...writing.logprobs import Alternative, Scored, TokenTexts
from .schema import CompletionRequest

_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens")


class CompletionsWire:
    """The chunks of one HTTP request's prompts, each its own choice.

    Args:
        requests: that were submitted, one for each prompt.
        body: what the client asked for.
        tokenizer: of the model.
        model: its name. fingerprint: of what answers depend on.
    """

    done = sse.DONE

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        body: CompletionRequest,
        tokenizer: ChatTokenizer,
        model: str,
        fingerprint: str,
    ) -> None:
        self._requests, self._body, self._tokenizer = requests, body, tokenizer
        self._wants_usage = body.wants_usage() or not body.stream
        self._n = requests[0].n
        self._prompts = [_Prompt(tokenizer, request) for request in requests]
        self._offsets = [0] * (self._n * len(requests))
        self._head = {
            "id": f"cmpl-{requests[0].request_id.partition('-')[2]}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._text_events: dict[int, sse.TextEvent] = {}  # by choice

    def begin(self) -> Iterable[Part]:
        """The prompts, where they are to be echoed, with the scores of their first tokens."""
        if not self._body.echo:
            return
        for number, request in enumerate(self._requests):
            rows = [self._prompts[number].first()] if self._body.logprobs is not None else []
            text = self._tokenizer.decode(list(request.prompt))
            yield from (self._chunk(index, text, self._columns(index, rows)) for index in self._choices(number))

    def progress(self, number: int, counts: Chunk) -> Part:
        """How far a prompt has come."""
        return {**self._head, "choices": [], "prompt_progress": {"index": number * self._n, **counts}}

    def prompt_scores(self, number: int, scores: Sequence[TokenLogprob]) -> Iterable[Part]:
        """Without text, which :meth:`begin` has said."""
        rows = [self._prompts[number].push(item) for item in scores]
        return [self._chunk(index, "", self._columns(index, rows)) for index in self._choices(number)]

    def said(self, said: Said) -> Iterable[Part]:
        """One chunk."""
        index, deltas, scored, _ = said
        text = "".join(delta["content"] for delta in deltas)
        if scored or not self._body.stream:
            return (self._chunk(index, text, self._columns(index, scored)),)
        if index not in self._text_events:
            self._text_events[index] = sse.TextEvent(sse.event(self._chunk(index, sse.TextEvent.HOLE, None)))
        return (self._text_events[index](text),)

    def ended(self, ended: Ended) -> Iterable[Part]:
        """One chunk, without text. What is told of a request stands beside its choice where there are several."""
        chunk = self._chunk(ended.choice, "", None, ended.reason.value, ended.stop_reason)
        if ended.report is not None:
            place = chunk if len(self._requests) == 1 else chunk["choices"][0]
            place["pacellm"] = ended.report
        return (chunk,)

    async def complete(self, finished: Sequence[Finished]) -> Iterable[Part]:
        """The usage of all prompts, where it is asked for."""
        prompt, completion, cached = (sum(getattr(one.usage, name) for one in finished) for name in _COUNTS)
        counts = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return [{**self._head, "choices": [], "usage": counts}] if self._wants_usage else []

    def event(self, chunk: Chunk) -> bytes:
        """A chunk as an event of a stream."""
        return sse.event(chunk)

    def failed(self, error: PaceError) -> bytes:
        """The error object as one."""
        return sse.event(body_of(error))

    def _choices(self, number: int) -> range:
        """A prompt's choices."""
        return range(number * self._n, (number + 1) * self._n)

    def _chunk(
        self, index: int, text: str, logprobs: Chunk | None, reason: str | None = None, stop: str | int | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "choices": [{**choice, **({} if stop is None else {"stop_reason": stop})}]}

    def _columns(self, index: int, rows: Sequence[Scored]) -> Chunk | None:
        if not rows:
            return None
        columns: Chunk = {name: [] for name in _LISTS}
        for row in rows:
            columns["tokens"].append(row.text)
            columns["token_logprobs"].append(row.logprob)
            columns["top_logprobs"].append(None if row.logprob is None else _named([row.own, *row.top]))
            columns["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(row.text)
        return columns


class _Prompt:
    """Scores of a prompt's tokens, in order."""

    def __init__(self, tokenizer: ChatTokenizer, request: GenerationRequest) -> None:
        self._first, self._left = request.prompt[0], len(request.prompt)
        self._texts = TokenTexts(tokenizer.vocabulary, skip_special=False, is_start=True)

    def first(self) -> Scored:
        self._left -= 1
        return self._texts.first(self._first, is_last=not self._left)

    def push(self, item: TokenLogprob) -> Scored:
        self._left -= 1
        return self._texts.push(item, is_last=not self._left)


def _named(alternatives: Sequence[Alternative]) -> dict[str, float]:
    """Log-probabilities by text, the chosen token's first; other tokens of the same text by their numbers."""
    found: dict[str, float] = {}
    tokens: set[int] = set()
    for one in alternatives:
        if one.token not in tokens:
            tokens.add(one.token)
            found[one.text if one.text not in found else f"token_id:{one.token}"] = one.logprob
    return found


class CompletionsFold:
    """The non-streamed answer: the same chunks, added up."""

    def __init__(self) -> None:
        self._answer: Chunk = {}
        self._choices: dict[int, Chunk] = {}

    def add(self, chunk: Chunk) -> None:
        """Add one."""
        self._answer |= {name: value for name, value in chunk.items() if name != "choices"}
        for part in chunk["choices"]:
            known = self._choices.setdefault(part["index"], {**part, "text": [], "logprobs": None})
            known["text"].append(part["text"])
            known |= {**part, "text": known["text"], "logprobs": _joined(known["logprobs"], part["logprobs"])}

    def whole(self) -> Chunk:
        """The answer."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {**self._answer, "choices": [{**choice, "text": "".join(choice["text"])} for choice in choices]}


def _joined(known: Chunk | None, more: Chunk | None) -> Chunk | None:
    """Columns of log-probabilities; ``known`` is added to."""
    if known is None or more is None:
        return known if more is None else {name: list(more[name]) for name in _LISTS}
    for name in _LISTS:
        known[name] += more[name]
    return known
