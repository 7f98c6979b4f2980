"""Many sessions over a small pool: ``python -m load_tests.scenarios.many_sessions``.

``--sessions`` conversations of ``--rounds`` rounds, ``--clients`` at a time, on a server with bank rows for ``--pool``
of them, less KV and host memory than they need and a directory below: they are moved down and brought back all the
time. There are ten kinds of conversation; what each must hear was asked before, one by one with everything resident.
A session that hears something else, or is ever ``lost``, is a failure. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter

import httpx

from load_tests.scenarios.books import close_books, grown, open_books, wait_until_idle
from load_tests.scenarios.client import Reply, ask, open_client
from load_tests.scenarios.servers import given_or_own, parser, report
from load_tests.scenarios.talks import FOLLOWING, Talk, make_talk, spread, talk_through

_KINDS = 10
_ROW = 600_000  # bytes of a session's banks of the bundled model, rounded up


async def all_rounds(client: httpx.AsyncClient, talks: list[Talk], sessions: int, clients: int) -> list[list[Reply]]:
    """Every session's replies. A round of all sessions ends before the next begins, each in an order of its own, so
    that the session used last is asked again last."""
    heard: list[list[Reply]] = [[] for _ in range(sessions)]
    free = asyncio.Semaphore(clients)
    order = random.Random(0)

    async def one(number: int) -> None:
        talk = talks[number % len(talks)]
        async with free:
            messages = talk.messages([reply.text for reply in heard[number]])
            heard[number].append(await ask(client, messages, f"many-{number}"))

    for _ in talks[0].questions:
        numbers = list(range(sessions))
        order.shuffle(numbers)
        await asyncio.gather(*(one(number) for number in numbers))
    return heard


def differences(reference: list[list[Reply]], heard: list[list[Reply]]) -> list[str]:
    """What a session heard that it should not have, and states it should not have been in."""
    wrong = []
    for number, replies in enumerate(heard):
        expected = reference[number % len(reference)]
        for turn, (reply, right) in enumerate(zip(replies, expected, strict=True)):
            if reply.text != right.text:
                wrong.append(f"session {number}, round {turn}: {reply.text!r} instead of {right.text!r} "
                             f"({reply.pace.get('session')}, {reply.pace.get('note')})")  # fmt: skip
            is_alike = reply.pace.get("cached_tokens") == right.pace.get("cached_tokens")  # kept progress is used
            if is_alike and reply.pace.get("bank") != right.pace.get("bank"):
                wrong.append(f"session {number}, round {turn}: its banks were read or written otherwise than alone")
            state = reply.pace.get("session")
            if state != "new" if turn == 0 else state not in FOLLOWING:
                wrong.append(f"session {number}, round {turn} was {state}: {reply.pace.get('note')}")
    return wrong


async def run(
    url: str, key: str | None, *, sessions: int, rounds: int, clients: int, tokens: int
) -> tuple[dict, list[str]]:
    """(facts, failures)."""
    talks = [make_talk(seed, rounds, tokens) for seed in range(min(_KINDS, sessions))]
    async with open_client(url, key) as client:
        before = await open_books(client)
        reference = [await talk_through(client, talk, f"kind-{number}") for number, talk in enumerate(talks)]
        (await client.delete("/v1/sessions")).raise_for_status()
        started = await wait_until_idle(client)
        heard = await all_rounds(client, talks, sessions, clients)
        ended = await wait_until_idle(client)
        failures = await close_books(client, before)
    failures += differences(reference, heard)
    if len(ended.sessions) != sessions:
        failures.append(f"{len(ended.sessions)} sessions are listed, not {sessions}")
    right = sum(answer in reply.text for talk, replies in zip(talks, reference, strict=True)
                for answer, reply in zip(talk.answers, replies, strict=True))  # fmt: skip
    replies = [reply for one in heard for reply in one]
    facts = {
        "sessions": sessions,
        "rounds": rounds,
        "prompt_tokens_of_a_first_round": reference[0][0].usage["prompt_tokens"],
        "states": dict(Counter(reply.pace["session"] for reply in replies)),
        "answers_equal": sum(reply.text == reference[number % len(talks)][turn].text
                             for number, one in enumerate(heard) for turn, reply in enumerate(one)),
        "reference_answers_right": f"{right}/{len(talks) * rounds}",
        "refused_for_now": sum(reply.refusals for reply in replies),
        "first_token": spread([reply.first for reply in replies if reply.times]),
        "by_tier_at_the_end": {name.rsplit("/", 1)[1]: value for name, value in ended.samples.items()
                               if name.startswith("pacellm_sessions_by_tier/")},
        **{name: grown(started, ended, f"pacellm_session_{name}_total")
           for name in ("evictions", "spills", "restores")},
    }  # fmt: skip
    return facts, failures


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__)
    found.add_argument("--sessions", type=int, default=500)
    found.add_argument("--pool", type=int, default=50, help="sessions whose banks fit (of a server that is started)")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--clients", type=int, default=16)
    found.add_argument("--tokens", type=int, default=1500, help="of a document")
    args = found.parse_args(arguments)
    if args.small:
        args.sessions, args.pool, args.rounds, args.clients, args.tokens = 12, 3, 2, 4, 1000
    running = min(args.clients, 8)
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--max-num-seqs", str(running), "--pa-memory", str((args.pool + running) * _ROW),
                 "--kv-cache-memory-bytes", "512M", "--session-memory", str(args.pool * args.tokens * 7680 // 2),
                 "--session-host-memory", str(args.pool * args.tokens * 7680 // 2), "--session-dir", directory,
                 "--max-model-len", "16384"]  # fmt: skip
        with given_or_own(args, flags) as (url, _):
            facts, failures = asyncio.run(
                run(url, args.api_key, sessions=args.sessions, rounds=args.rounds, clients=args.clients,
                    tokens=args.tokens)
            )  # fmt: skip
    return report("many_sessions", facts, failures)


if __name__ == "__main__":
    raise SystemExit(main())
