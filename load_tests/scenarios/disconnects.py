"""Storms of clients that leave: ``python -m load_tests.scenarios.disconnects``.

``--storms`` times ``--clients`` requests at once, each given up at a moment of its own: in the middle of its body,
queued, while its prompt is read, while it decodes, while its answer is stored; streamed or not: chat, a part of it in
sessions, responses alone and in conversations, and the endpoints of sessions. Beside them ``--steady`` streams ask on,
and must hear what they heard before. Afterwards no request may run or wait, the engine may have survived no fault,
memory and file descriptors must be where they were, and every stormed session must answer, and read its banks, exactly
as a fork made before the storm does. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import httpx

from load_tests.scenarios.books import close_books, grown, open_books, read_books, wait_until_idle
from load_tests.scenarios.client import Refused, Reply, ask, chat_body, open_client
from load_tests.scenarios.servers import OwnServer, given_or_own, parser, report
from load_tests.scenarios.talks import Talk, make_talk

_NEVER_DONE = 4000  # tokens to generate: no request of a storm may end well
_LATEST = 3.0  # seconds after which every client has gone
_SESSIONS = 4
_GUESTS = 6  # names that requests about sessions share
_EXPECTED = tuple(f"HTTP/1.1 {status}".encode() for status in (200, 201, 404, 409, 429))
Kind = Literal["chat", "response", "create", "fork", "reset", "delete", "snapshot"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_WEIGHTS = (50, 25, 5, 5, 5, 5, 5)
_SHORT = Talk("The code of the archive is 48213.", ("What is it?", "And now?"), ("48213", "48213"))


@dataclass(frozen=True)
class Visit:
    """One request of a storm.

    Attributes:
        kind: of request. ``name``: of the session or conversation that it is about; None without.
        stays: seconds until its client goes. ``share``: of the request's bytes that it sends before.
        until: what its client goes upon, where it comes sooner.
    """

    talk: Talk
    kind: Kind
    name: str | None
    stream: bool
    stays: float
    share: float
    until: bytes | None = None

    def bytes(self, host: str, key: str | None) -> bytes:
        """The request as sent."""
        method, path, body = self._asked()
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json"]
        lines += [f"Content-Length: {len(data)}"]
        lines += [f"X-Session-ID: {self.name}"] if self.kind == "chat" and self.name else []
        lines += [f"Authorization: Bearer {key}"] if key else []
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + data

    def _asked(self) -> tuple[str, str, dict[str, Any] | None]:
        """Method, path and body."""
        match self.kind:
            case "chat":
                body = chat_body(self.talk.messages([self.talk.answers[0]]), _NEVER_DONE, ignore_eos=True)
                if not self.stream:
                    body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
                return "POST", "/v1/chat/completions", body
            case "response":
                text = self.talk.messages([])[0]["content"]
                told = {"conversation": self.name} if self.name else {}
                return "POST", "/v1/responses", {"input": text, "max_output_tokens": 1, "stream": self.stream, **told}
            case "create":
                return "POST", "/v1/sessions", {"session_id": self.name}
            case "fork":
                return "POST", "/v1/sessions/fork-0/fork", {"session_id": self.name}
            case "reset":
                return "POST", f"/v1/sessions/{self.name}/reset", None
            case "delete":
                return "DELETE", f"/v1/sessions/{self.name}", None
            case "snapshot":
                return "GET", "/v1/sessions/fork-0/snapshot?kv=true", None


def visits(talks: list[Talk], count: int, seed: int) -> list[Visit]:
    """A storm."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        kind = rng.choices(KINDS, _WEIGHTS)[0]
        talk, name, until = rng.choice([_SHORT] * len(talks) + talks), None, None
        if kind == "chat" and rng.random() < 0.4:
            talk, name = talks[number % _SESSIONS], f"storm-{number % _SESSIONS}"
        elif kind == "response" and rng.random() < 0.6:
            name = f"conversation-{seed}-{number}"
        elif kind not in ("chat", "response"):
            name = f"guest-{number % _GUESTS}"
        stream = rng.random() < 0.6
        if kind == "response" and stream and rng.random() < 0.5:
            talk, until = _SHORT, b"event: response.output_text.delta"
        share = rng.random() if rng.random() < 0.15 else 1.0
        found.append(Visit(talk, kind, name, stream, rng.random() ** 2 * _LATEST, share, until))
    return found


async def visit(url: str, key: str | None, one: Visit) -> bytes:
    """Send, wait, go, half of the times with a reset; what had come."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    data = one.bytes(address.netloc, key)
    came = b""
    with suppress(ConnectionError):
        writer.write(data[: int(len(data) * one.share)])
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(one.stays):
                while (one.until is None or one.until not in came) and (piece := await reader.read(65536)):
                    came += piece
    if int(one.stays * 1e6) % 2:
        writer.transport.abort()
    else:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return came


async def steady(client: httpx.AsyncClient, talk: Talk, until: asyncio.Event) -> list[Reply]:
    """Ask the first question until told to stop, at least once."""
    replies = []
    while not replies or not until.is_set():
        replies.append(await ask(client, talk.messages([])))
    return replies


async def storm(
    client: httpx.AsyncClient, url: str, key: str | None, talks: list[Talk], *, storms: int, clients: int, streams: int
) -> tuple[dict[str, Any], list[str]]:
    """All storms, with steady streams beside them: (facts, failures)."""
    reference = [await ask(client, talk.messages([])) for talk in talks[:streams]]
    until = asyncio.Event()
    beside = asyncio.gather(*(steady(client, talk, until) for talk in talks[:streams]))
    came, ended_well, refused, failures = 0, 0, 0, []
    for number in range(storms):
        got = await asyncio.gather(*(visit(url, key, one) for one in visits(talks, clients, number)))
        came += sum(b"data: {" in one for one in got)
        ended_well += sum(b"data: [DONE]" in one or b'"finish_reason":"length"' in one for one in got)
        refused += sum(one.startswith((b"HTTP/1.1 429", b"HTTP/1.1 503")) for one in got)
        failures += [f"a request was answered with {one[:200]!r}" for one in got
                     if one and not one.startswith(_EXPECTED)]  # fmt: skip
    until.set()
    heard = await beside
    for right, replies in zip(reference, heard, strict=True):
        failures += [f"a steady stream heard {reply.text!r}, before {right.text!r}"
                     for reply in replies if reply.text != right.text]  # fmt: skip
    if ended_well:
        failures.append(f"{ended_well} requests of a storm ended well: it tells nothing of their sessions")
    return {"requests": storms * clients, "had_begun_to_answer": came, "refused": refused,
            "steady_answers": sum(map(len, heard))}, failures  # fmt: skip


async def begin(client: httpx.AsyncClient, talks: list[Talk]) -> None:
    """Sessions with one round each, and a fork of each."""
    for number, talk in enumerate(talks[:_SESSIONS]):
        await ask(client, talk.messages([]), f"storm-{number}")
        made = await client.post(f"/v1/sessions/storm-{number}/fork", json={"session_id": f"fork-{number}"})
        made.raise_for_status()


async def compare(client: httpx.AsyncClient, talks: list[Talk]) -> list[str]:
    """Where a stormed session is not what its fork is."""
    wrong = []
    for number, talk in enumerate(talks[:_SESSIONS]):
        messages = talk.messages([talk.answers[0]])
        try:
            stormed = await ask(client, messages, f"storm-{number}")
            forked = await ask(client, messages, f"fork-{number}")
        except Refused as error:
            wrong.append(f"session {number} does not answer after the storm: {error}")
            continue
        if (stormed.text, stormed.pace["bank"]) != (forked.text, forked.pace["bank"]):
            wrong.append(f"session {number} is not what it was: {stormed.text!r}, its fork {forked.text!r}")
        shown = (await client.get(f"/v1/sessions/storm-{number}")).json()
        if shown["commits"] != 2:
            wrong.append(f"session {number} has {shown['commits']} commits, not 2")
    return wrong


async def run(
    url: str, key: str | None, server: OwnServer | None, *, storms: int, clients: int, streams: int, tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """(facts, failures)."""
    talks = [make_talk(seed, 2, tokens) for seed in range(max(_SESSIONS, streams))]
    async with open_client(url, key) as client:
        before = await open_books(client)
        await begin(client, talks)
        started, handles = await read_books(client), server.handles() if server else None
        facts, failures = await storm(client, url, key, talks, storms=storms, clients=clients, streams=streams)
        ended = await wait_until_idle(client)
        failures += await compare(client, talks)
        failures += await close_books(client, before)
        health = await client.get("/health")
        if health.status_code != 200:
            failures.append(f"/health says {health.text}")
        if server is not None and handles is not None:
            await asyncio.sleep(0.5)
            now = server.handles() or 0
            facts["file_descriptors"] = [handles, now]
            if now > handles + 66:  # this client keeps up to 64 connections
                failures.append(f"left over: {now} file descriptors, before {handles}")
    facts["aborted"] = grown(started, ended, "pacellm_request_aborted_total")
    facts["failed"] = grown(started, ended, "pacellm_request_failure_total")
    faults = {
        name: value for name, value in ended.samples.items() if name.startswith("pacellm_engine_faults") and value
    }
    failures += [f"the engine survived {value:g} faults: {name}" for name, value in faults.items()]
    return facts, failures


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__)
    found.add_argument("--storms", type=int, default=10)
    found.add_argument("--clients", type=int, default=100)
    found.add_argument("--steady", type=int, default=4)
    found.add_argument("--tokens", type=int, default=3000, help="of a document")
    args = found.parse_args(arguments)
    if args.small:
        args.storms, args.clients, args.steady, args.tokens = 2, 12, 1, 1500
    flags = ["--max-num-seqs", "16", "--kv-cache-memory-bytes", "1G", "--max-model-len", "16384"]
    with given_or_own(args, flags) as (url, server):
        facts, failures = asyncio.run(
            run(url, args.api_key, server, storms=args.storms, clients=args.clients, streams=args.steady,
                tokens=args.tokens)
        )  # fmt: skip
        if server is not None and "Traceback" in server.log():
            failures.append(f"the server logged an exception: {server.log()[-2000:]}")
    return report("disconnects", facts, failures)


if __name__ == "__main__":
    raise SystemExit(main())
