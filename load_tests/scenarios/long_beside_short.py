"""One long prompt beside short streams: ``python -m load_tests.scenarios.long_beside_short``.

``--streams`` clients ask short questions one after the other, first alone for ``--alone`` seconds and then for as long
as a prompt of ``--tokens`` tokens is being read and answered. Every short answer must be the one its question got
alone, the long answer must be right, and its stream must never be silent for longer than 20 s. Printed: gaps between
tokens of the short streams and their time to first token, alone and beside. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import time

import httpx

from load_tests.scenarios.books import close_books, open_books
from load_tests.scenarios.client import Message, Reply, ask, open_client
from load_tests.scenarios.servers import given_or_own, parser, report
from load_tests.scenarios.talks import spread
from pacellm.demo.generator import Document
from pacellm.demo.local import sample_document

_NEW = 32
_SILENCE = 20.0


def question(number: int) -> list[Message]:
    """A short question, another for each stream."""
    return [{"role": "user", "content": f"The code of archive {number} is {48213 + number}. What is it?"}]


async def short(client: httpx.AsyncClient, number: int, until: asyncio.Event) -> list[Reply]:
    """Ask one question over and over, at least once."""
    replies = []
    while not replies or not until.is_set():
        replies.append(await ask(client, question(number), max_tokens=_NEW, ignore_eos=True))
    return replies


async def alone(client: httpx.AsyncClient, streams: int, seconds: float) -> list[list[Reply]]:
    """The short streams with nothing beside them."""
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, until.set)
    return await asyncio.gather(*(short(client, number, until) for number in range(streams)))


async def read_long(client: httpx.AsyncClient, document: Document) -> tuple[str, float, float, int]:
    """(answer, seconds to the end, longest silence, progress chunks) of the long prompt."""
    body = {"messages": [{"role": "user", "content": f"{document.text}\n\n{document.facts[0].question}"}],
            "max_tokens": 24, "temperature": 0, "stream": True, "return_progress": True}  # fmt: skip
    text, silence, progress = "", 0.0, 0
    started = last = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            now = time.perf_counter()
            silence, last = max(silence, now - last), now
            progress += '"prompt_progress"' in line
            if '"content"' in line:
                text += _content(line)
    return text, time.perf_counter() - started, silence, progress


def _content(line: str) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"])


def facts_of(replies: list[list[Reply]]) -> dict[str, object]:
    """What a table shows of the short streams."""
    every = [reply for one in replies for reply in one]
    return {
        "answers": len(every),
        "gap": spread([gap for reply in every for gap in reply.gaps]),
        "first_token": spread([reply.first for reply in every]),
    }


async def run(url: str, key: str | None, *, streams: int, tokens: int, seconds: float) -> tuple[dict, list[str]]:
    """(facts, failures)."""
    document = sample_document(tokens, seed=0)
    async with open_client(url, key) as client:
        before = await open_books(client)
        reference = await alone(client, streams, seconds)
        until = asyncio.Event()
        shorts = asyncio.gather(*(short(client, number, until) for number in range(streams)))
        await asyncio.sleep(0.2)
        answer, took, silence, progress = await read_long(client, document)
        until.set()
        beside = await shorts
        failures = await close_books(client, before)
    for number, (first, later) in enumerate(zip(reference, beside, strict=True)):
        texts = {reply.text for reply in [*first, *later]}
        if len(texts) != 1:
            failures.append(f"stream {number} heard {len(texts)} different answers to one question: {sorted(texts)}")
        short_ones = [reply for reply in [*first, *later] if reply.usage.get("completion_tokens") != _NEW]
        failures += [f"stream {number} got {reply.usage} for {_NEW} tokens" for reply in short_ones]
    if document.facts[0].answer not in answer:
        failures.append(f"the long prompt's answer is {answer!r}, not {document.facts[0].answer!r}")
    if silence > _SILENCE:
        failures.append(f"the long prompt's stream was silent for {silence:.1f} s")
    facts = {"streams": streams, "tokens": tokens, "long_seconds": round(took, 2), "long_silence": round(silence, 2),
             "progress_chunks": progress, "alone": facts_of(reference), "beside": facts_of(beside)}  # fmt: skip
    return facts, failures


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__)
    found.add_argument("--streams", type=int, default=32)
    found.add_argument("--tokens", type=int, default=200_000)
    found.add_argument("--alone", type=float, default=10.0, help="seconds without the long prompt")
    args = found.parse_args(arguments)
    if args.small:
        args.streams, args.tokens, args.alone = 4, 6000, 0.5
    with given_or_own(args, ["--max-num-seqs", str(args.streams + 1)]) as (url, _):
        facts, failures = asyncio.run(
            run(url, args.api_key, streams=args.streams, tokens=args.tokens, seconds=args.alone)
        )
    return report("long_beside_short", facts, failures)


if __name__ == "__main__":
    raise SystemExit(main())
