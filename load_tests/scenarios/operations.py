"""What a client may do to a server, drawn at random, carried out, and compared."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

Message = dict[str, str]
_PLACES = ("amber", "cedar", "harbor", "iron", "maple", "silver")
_FILLER = "The river runs past the mill, and the road follows it to the bridge. "
_LONGEST = 9  # messages of a session, after which it is emptied or goes


class Failure(Exception):
    """The server said something that no server may say."""


@dataclass(frozen=True)
class Outcome:
    """What came of an operation.

    Attributes:
        texts, ends: by choice. scores: (token, log-probability) in order, by choice.
        bank: reads. cached: tokens that were there. state: of the session. response: its id.
        is_durable: nothing says that the disk has not taken it.
    """

    status: int
    code: str | None = None
    texts: tuple[str, ...] = ()
    ends: tuple[str | None, ...] = ()
    scores: tuple[tuple[tuple[str, float], ...], ...] = ()
    bank: Any = None
    cached: int | None = None
    state: str | None = None
    response: str | None = None
    is_durable: bool = True

    def differs(self, other: Outcome) -> str | None:
        """The first thing that is not as in the other, if any; reads of banks where as much was read anew."""
        if max(self.status, other.status) >= 300 and self.status != other.status:
            return f"status {self.status} ({self.code}) instead of {other.status} ({other.code})"
        for name in ("code", "texts", "ends", "scores"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r} instead of {theirs!r}"
        if self.cached == other.cached and self.bank != other.bank:
            return f"reads of banks {self.bank!r} instead of {other.bank!r}"
        return None


@dataclass(frozen=True)
class Operation:
    """One thing that is done.

    Attributes:
        kind: its name. touches: sessions that it may change, the one that tells last.
        method, path, body: of the request; ``{chain}`` in a path and ``chain`` in a body stand for the last response.
        source: a session whose snapshot is the body.
        user: the new message. session: whose log it goes to.
        leaves_after: pieces of a stream that a client who leaves still reads.
    """

    kind: str
    touches: tuple[str, ...]
    method: str
    path: str
    body: dict[str, Any] | None = None
    source: str | None = None
    user: str | None = None
    session: str | None = None
    leaves_after: int = 0
    forgets: bool = field(default=False)

    @property
    def changes(self) -> bool:
        """Where it succeeds, the sessions that it touches are others than before."""
        return self.kind != "refused" and (self.kind != "turn in a session" or self.user is not None)

    @property
    def involved(self) -> set[str]:
        """Sessions that it reads or changes."""
        source = self.path.split("/")[3] if self.kind == "fork" else self.source
        return {*self.touches, *([source] if source is not None else [])}

    async def run(
        self, client: httpx.AsyncClient, which: int, chain: tuple[str, str] | None, leaves: float | None
    ) -> Outcome | None:
        """Carry it out; None where the connection ended first, by this client's will or the server's end.

        Args:
            which: server this is. leaves: seconds after which the client goes.

        Raises:
            Failure: an answer that cannot be one.
        """
        work = self._run(client, which, chain, leaves is not None)
        try:
            return await (work if leaves is None else asyncio.wait_for(work, leaves))
        except httpx.ReadTimeout as error:
            raise Failure("no answer in time") from error
        except (httpx.TransportError, TimeoutError, _Left):
            return None

    async def _run(
        self, client: httpx.AsyncClient, which: int, chain: tuple[str, str] | None, leaves: bool
    ) -> Outcome | None:
        last = chain[which] if chain is not None else ""
        path, body = self.path.replace("{chain}", last), dict(self.body or {})
        if body.pop("chain", False):
            body["previous_response_id"] = last
        if self.source is not None:
            found = await client.get(f"/v1/sessions/{self.source}/snapshot?kv=true")
            if found.status_code != 200:
                return _refused(found.status_code, found.content)
            content: dict[str, Any] = {"content": found.content}
        else:
            content = {"json": body} if self.body is not None else {}
        if not body.get("stream"):
            answer = await client.request(self.method, path, **content)
            return _outcome(answer.status_code, answer.content)
        async with client.stream(self.method, path, **content) as answer:
            if answer.status_code != 200:
                return _refused(answer.status_code, await answer.aread())
            return await _streamed(answer, self.leaves_after if leaves else None)

    def note(self, logs: dict[str, list[Message]], outcome: Outcome) -> None:
        """What a session stands for afterwards."""
        if outcome.status >= 400:
            return
        if self.forgets:
            for name in self.touches:
                logs.pop(name, None)
        if self.source is not None:
            logs[self.touches[-1]] = list(logs.get(self.source, []))
        elif self.user is not None and self.session is not None and outcome.texts:
            log = logs.setdefault(self.session, [])
            log += [{"role": "user", "content": self.user}, {"role": "assistant", "content": outcome.texts[0]}]
        elif self.kind == "fork":
            (source,) = self.involved - {*self.touches}
            logs[self.touches[-1]] = list(logs.get(source, []))


class _Left(Exception):
    """This client has gone."""


def draw(
    rng: random.Random, sessions: list[str], logs: dict[str, list[Message]], has_chain: bool, flavours: list[str]
) -> Operation:
    """The next operation of a client.

    Args:
        sessions: that are its own. logs: what they stand for. has_chain: it had a response before.
        flavours: PA modes, and ``dense``, that a request may ask for.
    """
    session = rng.choice(sessions)
    other = rng.choice([name for name in sessions if name != session])
    log = logs.get(session, [])
    if len(log) >= _LONGEST:
        return rng.choice((_delete(session), _reset(session)))
    kinds: list[tuple[int, Any]] = [
        (30, lambda: _turn(rng, session, log, flavours)),
        (10, lambda: _turn(rng, None, [], flavours)),
        (8, lambda: _completion(rng, flavours)),
        (8, lambda: _response(rng, has_chain, flavours)),
        (4, lambda: Operation("forget", (), "DELETE", "/v1/responses/{chain}") if has_chain else _reset(session)),
        (6, lambda: _conversation(rng, f"{sessions[0]}-talk", flavours)),
        (6, lambda: _fork(session, other)),
        (5, lambda: Operation("snapshot", (other,), "PUT", f"/v1/sessions/{other}/snapshot", source=session)),
        (3, lambda: _reset(session)),
        (5, lambda: _delete(session)),
        (1, lambda: _delete(f"{sessions[0]}-talk")),
        (2, lambda: Operation("create", (session,), "POST", "/v1/sessions", {"session_id": session})),
        (2, lambda: _wrong(rng, session)),
    ]
    return rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()  # type: ignore[no-any-return]


def _delete(session: str) -> Operation:
    return Operation("delete", (session,), "DELETE", f"/v1/sessions/{session}", forgets=True)


def _reset(session: str) -> Operation:
    return Operation("reset", (session,), "POST", f"/v1/sessions/{session}/reset", forgets=True)


def _fork(session: str, other: str) -> Operation:
    return Operation("fork", (other,), "POST", f"/v1/sessions/{session}/fork", {"session_id": other})


def _said(rng: random.Random) -> str:
    """A message with a fact or a question."""
    place = rng.choice(_PLACES)
    if rng.random() < 0.4:
        return f"What is the access code of the {place} archive?"
    filler = _FILLER * rng.choice((0, 1, 4, 16))
    return f"{filler}The access code of the {place} archive is {rng.randrange(10_000, 100_000)}. {filler}"


def _sampling(rng: random.Random, flavours: list[str]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if rng.random() < 0.5:
        flavour = rng.choice(flavours)
        own |= {"ce_density": 1.0} if flavour == "dense" else {"pa": flavour}
    if rng.random() < 0.1:
        own["commit"] = False
    found: dict[str, Any] = {"pacellm": own, "temperature": 0}
    if rng.random() < 0.3:
        found |= {"temperature": 0.9, "seed": rng.randrange(1000)}
    return found


def _turn(rng: random.Random, session: str | None, log: list[Message], flavours: list[str]) -> Operation:
    text, body = _said(rng), _sampling(rng, flavours)
    new = [{"role": "user", "content": text}]
    if session is not None and log and rng.random() < 0.4:
        body["pacellm"]["append"] = True
        messages = new
    else:
        messages = [*log, *new]
    body |= {"messages": messages, "max_tokens": rng.choice((0, 1, 4, 12, 24)), "stream": rng.random() < 0.5}
    if session is not None:
        body["session_id"] = session
    if rng.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": 2}
    if rng.random() < 0.1:
        body["n"] = 2
    commits = session is not None and body["pacellm"].get("commit", True)
    kind, touches = ("turn", ()) if session is None else ("turn in a session", (session,))
    return Operation(
        kind, touches, "POST", "/v1/chat/completions", body, user=text if commits else None, session=session,
        leaves_after=rng.randrange(6),
    )  # fmt: skip


def _completion(rng: random.Random, flavours: list[str]) -> Operation:
    body = _sampling(rng, flavours) | {"prompt": _said(rng), "max_tokens": rng.choice((0, 1, 8)), "logprobs": 1}
    body |= {"echo": rng.random() < 0.5, "stream": rng.random() < 0.5}
    return Operation("completion", (), "POST", "/v1/completions", body, leaves_after=rng.randrange(6))


def _response(rng: random.Random, has_chain: bool, flavours: list[str]) -> Operation:
    body = _sampling(rng, flavours) | {"input": _said(rng), "max_output_tokens": 12, "stream": rng.random() < 0.5}
    body["pacellm"].pop("commit", None)
    body.pop("seed", None)
    body["temperature"] = 0
    if has_chain and rng.random() < 0.7:
        body["chain"] = True
    return Operation("response", (), "POST", "/v1/responses", body, leaves_after=rng.randrange(8))


def _conversation(rng: random.Random, name: str, flavours: list[str]) -> Operation:
    operation = _response(rng, False, flavours)
    body = {**(operation.body or {}), "conversation": name}
    return Operation("conversation", (name,), "POST", "/v1/responses", body, leaves_after=operation.leaves_after)


def _wrong(rng: random.Random, session: str) -> Operation:
    """A request that is refused, and must be in the same words."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "session_id": session}
    body |= rng.choice(({"temperature": -1}, {"messages": []}, {"max_tokens": 10**9}, {"unknown": 1}))
    return Operation("refused", (session,), "POST", "/v1/chat/completions", body)


# -- answers -----------------------------------------------------------------------------------------------


def _refused(status: int, content: bytes) -> Outcome:
    try:
        return Outcome(status, json.loads(content)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        raise Failure(f"{status} without an error in it: {content[:200]!r}") from None


def _outcome(status: int, content: bytes) -> Outcome:
    if status >= 400:
        return _refused(status, content)
    answer = json.loads(content) if content else {}
    if answer.get("object") == "response" and "output" in answer:
        return _response_outcome(answer)
    if "choices" not in answer:
        return Outcome(status, is_durable=answer.get("durable", True))
    parts = _Parts()
    for choice in answer["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        parts.add(choice["index"], text, choice["logprobs"], choice["finish_reason"])
    return parts.outcome(answer)


def _response_outcome(answer: dict[str, Any]) -> Outcome:
    if answer.get("error") is not None:
        return Outcome(500, answer["error"].get("code"))
    text = "".join(part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"])
    own = answer.get("pacellm") or {}
    return Outcome(
        200, texts=(text,), ends=(answer["status"],), bank=own.get("bank"), cached=own.get("cached_tokens"),
        state=own.get("session"), response=answer["id"],
    )  # fmt: skip


class _Parts:
    """Choices as they come."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._ends: dict[int, str | None] = {}
        self._scores: dict[int, list[tuple[str, float]]] = {}

    def add(self, index: int, text: str | None, logprobs: Any, end: str | None) -> None:
        self._texts[index] = self._texts.get(index, "") + (text or "")
        self._ends[index] = end or self._ends.get(index)
        scores = self._scores.setdefault(index, [])
        if logprobs and "content" in logprobs:
            scores += [(item["token"], item["logprob"]) for item in logprobs["content"]]
        elif logprobs:
            scores += list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))

    def outcome(self, whole: dict[str, Any]) -> Outcome:
        own = whole.get("pacellm") or {}
        order = sorted(self._texts)
        return Outcome(
            200, texts=tuple(self._texts[index] for index in order), ends=tuple(self._ends[index] for index in order),
            scores=tuple(tuple(self._scores[index]) for index in order), bank=own.get("bank"),
            cached=own.get("cached_tokens"), state=own.get("session"),
        )  # fmt: skip


async def _streamed(answer: httpx.Response, leaves_after: int | None) -> Outcome:
    parts, whole, has_ended = _Parts(), {}, False  # type: ignore[var-annotated]
    number = 0
    async for data in _events(answer):
        if leaves_after is not None and number >= leaves_after:
            raise _Left
        number += 1
        if data == "[DONE]":
            has_ended = True
            continue
        chunk = json.loads(data)
        if chunk.get("error"):
            return Outcome(500, chunk["error"].get("code"))
        if chunk.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            return _response_outcome(chunk["response"])
        whole |= {name: chunk[name] for name in ("pacellm", "usage") if chunk.get(name)}
        for choice in chunk.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            parts.add(choice["index"], text, choice.get("logprobs"), choice["finish_reason"])
    if not has_ended:
        raise _Left  # cut by the server's end
    return parts.outcome(whole)


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line[6:]
