"""More work than the server can do: ``python -m load_tests.scenarios.overload``.

First what it can do: clients that ask one question after the other for ``--measure`` seconds, a few and then
``--clients``; the better of both counts. Then requests at random moments for ``--seconds``, ``--times`` as many as
that, each with ``--timeout`` seconds for its answer. Of what the server can do at least ``--share`` must end in answers
within their deadlines; whatever is refused must be refused soon, with a Retry-After where it is a 429. It wants a
machine that does nothing else. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx

from load_tests.scenarios.client import open_client
from load_tests.scenarios.servers import given_or_own, parser, report
from load_tests.scenarios.talks import percentile, spread

_SOON = 3.0  # seconds: a step, and the time that a busy machine takes to say so
_FEW = 4  # clients
_WARM_UP = 0.3  # of the measurement


@dataclass(frozen=True)
class Ended:
    """What became of a request: status, seconds from sending to its end, and the Retry-After of a refusal."""

    status: int
    seconds: float
    retry_after: str | None = None


def body_of(number: int, words: int, timeout: float | None) -> dict[str, Any]:
    """A prompt that shares no beginning with another's."""
    notes = [f"The code of archive {number + one} is {48213 + one}." for one in range(words)]
    text = " ".join([f"Note {number}.", *notes])
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    return body if timeout is None else {**body, "timeout": timeout}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Ended:
    """Send one request and wait for its end."""
    started = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body)
    return Ended(response.status_code, time.perf_counter() - started, response.headers.get("retry-after"))


async def capacity(client: httpx.AsyncClient, clients: int, seconds: float, words: int) -> float:
    """Answers a second where there is always more to do."""
    until, moments, numbers = time.perf_counter() + seconds, list[float](), iter(range(10**6, 2 * 10**6))
    since = until - (1 - _WARM_UP) * seconds

    async def one() -> None:
        while time.perf_counter() < until:
            if (await ask(client, body_of(next(numbers), words, None))).status == 200:
                moments.append(time.perf_counter())

    await asyncio.gather(*(one() for _ in range(clients)))
    return sum(since <= moment <= until for moment in moments) / (until - since)


async def storm(client: httpx.AsyncClient, rate: float, seconds: float, timeout: float, words: int) -> list[Ended]:
    """Requests at random moments, ``rate`` a second, until all have ended."""
    rng, tasks, until = random.Random(0), list[asyncio.Task[Ended]](), time.perf_counter() + seconds
    while time.perf_counter() < until:
        tasks.append(asyncio.create_task(ask(client, body_of(2 * 10**6 + len(tasks), words, timeout))))
        await asyncio.sleep(rng.expovariate(rate))
    return await asyncio.gather(*tasks)


def judged(ended: list[Ended], most: float, seconds: float, timeout: float, share: float) -> tuple[dict, list[str]]:
    """(facts, failures) of a storm on a server that can give ``most`` answers a second."""
    good = [one.seconds for one in ended if one.status == 200 and one.seconds <= timeout]
    refused = [one for one in ended if one.status == 429]
    facts = {
        "capacity_per_second": round(most, 3), "requests": len(ended), "in_time": len(good),
        "share_of_capacity": round(len(good) / (most * seconds), 3) if most else 0.0,
        "refused": len(refused), "late": sum(one.status == 504 for one in ended),
        "answer": spread(good), "refusal": spread([one.seconds for one in refused]),
    }  # fmt: skip
    failures = [f"{one.status} after {one.seconds:.1f} s" for one in ended if one.status not in (200, 429, 504)]
    failures += ["a 429 without Retry-After" for one in refused if not one.retry_after]
    if refused and percentile([one.seconds for one in refused], 0.99) > _SOON:
        failures.append(f"refusals took up to {max(one.seconds for one in refused):.1f} s")
    if facts["share_of_capacity"] < share:
        failures.append(f"{len(good)} answers in time are {facts['share_of_capacity']:.0%} of {most * seconds:.0f}")
    return facts, failures


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__)
    found.add_argument("--clients", type=int, default=32)
    found.add_argument("--measure", type=float, default=60.0, help="seconds, each time")
    found.add_argument("--seconds", type=float, default=120.0)
    found.add_argument("--times", type=float, default=3.0)
    found.add_argument("--timeout", type=float, default=15.0)
    found.add_argument("--words", type=int, default=120, help="sentences of a prompt")
    found.add_argument("--share", type=float, default=0.8)
    args = found.parse_args(arguments)
    if args.small:
        args.clients, args.measure, args.seconds, args.timeout, args.words = 16, 10.0, 20.0, 5.0, 60
        args.share /= 2  # seconds tell little of a rate

    async def run(url: str) -> tuple[dict[str, Any], list[str]]:
        async with open_client(url, args.api_key) as client:
            most = max([await capacity(client, count, args.measure, args.words) for count in (_FEW, args.clients)])
            ended = await storm(client, args.times * most, args.seconds, args.timeout, args.words)
        return judged(ended, most, args.seconds, args.timeout, args.share)

    with given_or_own(args, ["--max-num-seqs", "16", "--max-model-len", "32768"]) as (url, _):
        facts, failures = asyncio.run(run(url))
    return report("overload", {"times": args.times, "timeout": args.timeout, **facts}, failures)


if __name__ == "__main__":
    raise SystemExit(main())
