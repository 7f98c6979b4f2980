"""kill -9 and restart under load: ``python -m load_tests.scenarios.kill``.

A server with a session directory and ``--session-sync`` is killed ``--kills`` times at moments of no choosing while
``--sessions`` conversations go on, and started again on the same directory. A client whose answer was cut off looks at
its session: where the commit was not heard of, it goes on from it, else it asks again. Every answer must be what it
is without a kill, every heard answer must be in its session afterwards, none may be ``lost``, and nothing may be left
of half-written files. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from load_tests.scenarios.books import close_books, open_books, read_books
from load_tests.scenarios.client import Cut, Reply, ask, open_client
from load_tests.scenarios.servers import OWN_KEY, OwnServer, own_server, parser, report
from load_tests.scenarios.talks import FOLLOWING, Talk, make_talk, talk_through

_KINDS = 4
_PATIENCE = 120.0  # seconds that a client tries to reach the server again


class Conversation:
    """One client's session over the kills.

    Args:
        talk: what is asked. ``right``: what is to be heard.
    """

    def __init__(self, client: httpx.AsyncClient, name: str, talk: Talk, right: list[Reply]) -> None:
        self._client, self.name, self._talk, self._right = client, name, talk, right
        self.heard: list[str] = []
        self.failures: list[str] = []
        self.states: list[str] = []
        self.cuts = self.unheard = 0

    async def go(self) -> None:
        """All rounds."""
        while len(self.heard) < len(self._talk.questions):
            turn = len(self.heard)
            try:
                reply = await ask(self._client, self._talk.messages(self.heard), self.name)
            except Cut:
                self.cuts += 1
                await self._look(turn)
                continue
            self._check(turn, reply)
            self.heard.append(reply.text)

    async def _look(self, turn: int) -> None:
        """After a cut: whether the session has the round whose answer was not heard."""
        commits = await self._commits()
        if commits == turn + 1:
            self.unheard += 1
            self.heard.append(self._right[turn].text)  # that it is this one, the next round's cached tokens show
        elif commits != turn:
            self.failures.append(f"{self.name}: {commits} commits after {turn} answers were heard")

    async def _commits(self) -> int:
        """The session's commits, once there is a server that tells; 0 where there is no such session."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                shown = await self._client.get(f"/v1/sessions/{self.name}")
                if shown.status_code in (200, 404):
                    return shown.json().get("commits", 0)
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise SystemExit(f"the server did not come back within {_PATIENCE:.0f} s")
            await asyncio.sleep(0.1)

    def _check(self, turn: int, reply: Reply) -> None:
        state, right = reply.pace["session"], self._right[turn]
        self.states.append(state)
        if reply.text != right.text:
            self.failures.append(f"{self.name}, round {turn}: {reply.text!r} instead of {right.text!r} ({state})")
        cached, expected = reply.pace["cached_tokens"], right.pace["cached_tokens"]
        if cached == expected and reply.pace["bank"] != right.pace["bank"]:
            self.failures.append(
                f"{self.name}, round {turn}: its banks were read otherwise than without a kill ({state})"
            )
        if state != "new" if turn == 0 else state not in FOLLOWING:
            self.failures.append(f"{self.name}, round {turn} was {state}: {reply.pace.get('note')}")
        if turn and cached != expected and not reply.pace["replayed_tokens"]:  # a first round may use kept progress
            self.failures.append(f"{self.name}, round {turn}: {cached} cached tokens, not {expected} ({state})")


async def kill_often(server: OwnServer, kills: int, every: float) -> list[float]:
    """Kill and start again; the seconds until each was ready."""
    rng, took = random.Random(0), []
    for _ in range(kills):
        await asyncio.sleep(every * (0.5 + rng.random()))
        server.kill()
        took.append(await asyncio.to_thread(server.start))
    return took


def leftovers(directory: Path) -> list[str]:
    """What must not be in a session directory at rest: drafts, refused files, marks of dead servers, sessions."""
    left = [
        path for pattern in ("*/*.draft", "*/*.refused", "*/*.safetensors", "key.*") for path in directory.glob(pattern)
    ]
    marks = list((directory / "servers").iterdir())
    return [f"left over: {path.relative_to(directory)}" for path in left] + (
        [f"left over: {len(marks)} marks of servers"] if len(marks) != 1 else []
    )


async def run(
    server: OwnServer, directory: Path, *, kills: int, every: float, sessions: int, rounds: int, tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """(facts, failures)."""
    talks = [make_talk(seed, rounds, tokens) for seed in range(min(_KINDS, sessions))]
    async with open_client(server.url, OWN_KEY) as client:
        before = await open_books(client)
        right = [await talk_through(client, talk, f"right-{number}") for number, talk in enumerate(talks)]
        sizes = {session["id"]: session["tokens"] for session in (await read_books(client)).sessions}
        (await client.delete("/v1/sessions")).raise_for_status()
        killing = asyncio.create_task(kill_often(server, kills, every))
        conversations: list[Conversation] = []
        while not killing.done() or not conversations:  # new ones until the last kill
            begun = [Conversation(client, f"kill-{len(conversations) + number}", talks[number % len(talks)],
                                  right[number % len(talks)]) for number in range(sessions)]  # fmt: skip
            conversations += begun
            await asyncio.gather(*(one.go() for one in begun))
        took = await killing
        listed = {session["id"]: (session["commits"], session["tokens"])
                  for session in (await read_books(client)).sessions}  # fmt: skip
        failures = [failure for one in conversations for failure in one.failures]
        for number, one in enumerate(conversations):
            expected = (rounds, sizes[f"right-{number % sessions % len(talks)}"])
            if listed.get(one.name) != expected:
                failures.append(f"{one.name} has {listed.get(one.name)} commits and tokens, not {expected}")
        failures += await close_books(client, before)
    failures += leftovers(directory)
    facts = {
        "kills": kills,
        "conversations": len(conversations),
        "answers": sum(len(one.states) for one in conversations),
        "cut_off": sum(one.cuts for one in conversations),
        "committed_but_unheard": sum(one.unheard for one in conversations),
        "states": dict(Counter(state for one in conversations for state in one.states)),
        "ready_again_seconds": [round(seconds, 2) for seconds in took],
    }
    if kills and not facts["cut_off"]:
        failures.append("no answer was cut off by a kill: this run shows nothing; raise --sessions")
    return facts, failures


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    found = parser(__doc__, takes_url=False)
    found.add_argument("--kills", type=int, default=5)
    found.add_argument("--every", type=float, default=10.0, help="seconds of running between kills, about")
    found.add_argument("--sessions", type=int, default=12, help="conversations at once")
    found.add_argument("--rounds", type=int, default=4)
    found.add_argument("--tokens", type=int, default=2000, help="of a document")
    args = found.parse_args(arguments)
    if args.small:
        args.kills, args.every, args.sessions, args.rounds, args.tokens = 1, 2.0, 4, 2, 1000
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--session-dir", directory, "--session-sync", "--max-num-seqs", "8", "--max-model-len", "16384",
                 "--kv-cache-memory-bytes", "512M"]  # fmt: skip
        with own_server(flags) as server:
            facts, failures = asyncio.run(
                run(server, Path(directory), kills=args.kills, every=args.every, sessions=args.sessions,
                    rounds=args.rounds, tokens=args.tokens)
            )  # fmt: skip
            if "Traceback" in server.log():
                failures.append(f"the server logged an exception: {server.log()[-2000:]}")
    return report("kill", facts, failures)


if __name__ == "__main__":
    raise SystemExit(main())
