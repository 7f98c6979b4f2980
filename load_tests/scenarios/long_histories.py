"""Long sessions over a small device: ``python -m load_tests.scenarios.long_histories``.

``--sessions`` documents of ``--tokens`` tokens, more than the device has room for, are read once each; then every
session is asked ``--rounds`` questions by append, ``--clients`` at a time, in an order of its own each round. With
working memory the device holds views; with ``--whole`` it is a server without, which moves whole sessions. A session
that is ever ``lost`` or read again, or an error, is a failure. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from load_tests.scenarios.books import close_books, grown, open_books, wait_until_idle
from load_tests.scenarios.client import Reply, ask, open_client
from load_tests.scenarios.servers import OwnServer, given_or_own, parser, report
from load_tests.scenarios.talks import Talk, make_talk, spread

_KV = 7680  # bytes of a token's keys and values in the bundled model
_ON_ITS_WAY = ("resident", "restored")


@dataclass
class Heard:
    """What one phase of a run heard.

    Attributes:
        replies: by session, as far as they came.
    """

    replies: dict[int, Reply] = field(default_factory=dict)
    seconds: float = 0.0

    def in_states(self) -> dict[str, int]:
        """Replies by the state that their session was in."""
        return dict(Counter(reply.pace["session"] for reply in self.replies.values()))


async def phase(client: httpx.AsyncClient, contents: list[str], clients: int, seed: int, **more: Any) -> Heard:
    """Send every session one message."""
    heard, free = Heard(), asyncio.Semaphore(clients)
    order = list(range(len(contents)))
    random.Random(seed).shuffle(order)
    started = time.perf_counter()

    async def one(number: int) -> None:
        async with free:
            message = {"role": "user", "content": contents[number]}
            heard.replies[number] = await ask(client, [message], f"long-{number}", **more)

    await asyncio.gather(*(one(number) for number in order))
    heard.seconds = time.perf_counter() - started
    return heard


async def run(
    url: str, key: str | None, *, sessions: int, rounds: int, clients: int, tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """(facts, failures)."""
    talks = [make_talk(number, rounds, tokens) for number in range(sessions)]
    async with open_client(url, key) as client:
        before = await open_books(client)
        read = await phase(client, [talk.text for talk in talks], clients, 0, max_tokens=1)
        asked = []
        for turn in range(rounds):
            questions = [talk.questions[turn] for talk in talks]
            asked.append(await phase(client, questions, clients, 1 + turn, pacellm={"append": True}))
        ended = await wait_until_idle(client)
        failures = await close_books(client, before)
    failures += [
        f"session {number}, round {turn} was {reply.pace['session']}, {reply.pace['replayed_tokens']} tokens read again"
        for turn, heard in enumerate(asked) for number, reply in heard.replies.items()
        if reply.pace["session"] not in _ON_ITS_WAY or reply.pace["replayed_tokens"]
    ]  # fmt: skip
    seconds = sum(heard.seconds for heard in asked)
    facts = {
        "sessions": sessions,
        "read_seconds": round(read.seconds, 1),
        "read_tokens_a_second": round(sum(one.usage["prompt_tokens"] for one in read.replies.values()) / read.seconds),
        "questions_a_second": round(rounds * sessions / seconds, 2),
        "right": sum(_right(talks, turn, heard) for turn, heard in enumerate(asked)),
        "of": rounds * sessions,
        "states": [heard.in_states() for heard in asked],
        "first_token": spread([one.first for heard in asked for one in heard.replies.values() if one.times]),
        **{name: grown(before, ended, f"pacellm_session_{name}_total") for name in ("spills", "restores")},
    }
    return facts, failures


def _right(talks: list[Talk], turn: int, heard: Heard) -> int:
    return sum(reply.text == talks[number].answers[turn] for number, reply in heard.replies.items())


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__)
    found.add_argument("--sessions", type=int, default=100)
    found.add_argument("--rounds", type=int, default=2)
    found.add_argument("--clients", type=int, default=4)
    found.add_argument("--tokens", type=int, default=50_000, help="of a document")
    found.add_argument("--device-tokens", type=int, default=200_000, help="that the device has room for")
    found.add_argument("--host-memory", type=int, default=4_000_000_000, help="bytes for sessions in host memory")
    found.add_argument("--whole", action="store_true", help="without working memory")
    args = found.parse_args(arguments)
    if args.small:
        args.sessions, args.rounds, args.clients, args.tokens, args.device_tokens = 4, 2, 2, 6000, 16_384
        args.host_memory = 50_000_000
    with tempfile.TemporaryDirectory() as directory:
        flags = [
            "--max-num-seqs", str(args.clients), "--kv-cache-memory-bytes", str(args.device_tokens * _KV),
            "--session-host-memory", str(args.host_memory), "--session-dir", directory, "--no-pa",
            "--max-model-len", str(args.tokens + 8192),
        ]  # fmt: skip
        if not args.whole:
            flags += ["--working-memory", "4096"]
        with given_or_own(args, flags) as (url, server):
            facts, failures = asyncio.run(
                run(url, args.api_key, sessions=args.sessions, rounds=args.rounds, clients=args.clients,
                    tokens=args.tokens)
            )  # fmt: skip
            facts["peak_mib"] = _peak(server)
    return report("long_histories", facts, failures)


def _peak(server: OwnServer | None) -> int | None:
    return None if server is None else server.peak_memory() // 2**20


if __name__ == "__main__":
    raise SystemExit(main())
