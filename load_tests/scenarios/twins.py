"""Clients of two servers of which one is disturbed: what has happened there happens on the other, and is compared."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import httpx

from load_tests.scenarios.operations import Failure, Operation, Outcome, draw

_NAMES = ("a", "b", "c")
PATIENCE = 180.0
"""Seconds that a client tries to reach a server again."""

_EMPTY = {"commits": 0, "tokens": 0}
_SYNCED = ("turn in a session", "conversation")  # on disk before anybody sees them
_SETTLED = 4.0  # seconds without a change after which a request that was given up has not happened


class NoAnswer(Exception):
    """A server said nothing of use for long."""


@dataclass
class Tally:
    """What happened."""

    operations: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    comparisons: int = 0
    kills: int = 0
    cuts: int = 0
    rolled_back: int = 0
    failures: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "operations": sum(self.operations.values()), "kinds": dict(self.operations.most_common()),
            "comparisons": self.comparisons, "mismatches": len(self.failures), "kills": self.kills,
            "cut_off": self.cuts, "rolled_back": self.rolled_back,
            "sessions_were": dict(self.states.most_common()), "refused": dict(self.refusals.most_common()),
        }  # fmt: skip


class Worker:
    """One client of both servers, with sessions that are its own.

    Args:
        rough: the disturbed server's address. calm: the other's; None compares nothing. key: whose requests these are.
        name: begins its sessions' names. leaves: the share of requests that it gives up.
    """

    def __init__(
        self,
        rough: str,
        calm: str | None,
        key: str,
        name: str,
        seed: int,
        leaves: float,
        tally: Tally,
        flavours: list[str],
        *,
        is_lenient: bool,
    ) -> None:
        limits, headers = httpx.Limits(max_keepalive_connections=4), {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(PATIENCE, connect=10.0)
        self._rough, self._calm = (
            httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout)
            for url in (rough, calm or rough)
        )
        self._compares, self._is_lenient = calm is not None, is_lenient
        self._rng, self._leaves, self._tally, self._flavours = random.Random(seed), leaves, tally, flavours
        self._sessions = [f"{name}-{one}" for one in _NAMES]
        self._logs: dict[str, list[dict[str, str]]] = {}  # messages that a session stands for
        self._chain: tuple[str, str] | None = None  # the last response, by server
        self._trails: dict[str, deque[str]] = {}  # by session, the last operations
        self._volatile: set[str] = set()  # sessions whose last change the disk may not have
        self._kills = 0  # that this worker knows of: a restart forgets responses, and what conversations said

    async def run(self, until: float, requests: int | None = None) -> None:
        """Operations until a time, or so many."""
        done = 0
        async with self._rough, self._calm:
            while time.monotonic() < until and not self._tally.failures and (requests is None or done < requests):
                operation = draw(self._rng, self._sessions, self._logs, self._chain is not None, self._flavours)
                self._tally.operations[operation.kind] += 1
                try:
                    await self._do(operation)
                except (Failure, NoAnswer) as failure:
                    self._tally.failures.append(f"{operation}: {failure}; {self._told()}")
                done += 1

    async def _do(self, operation: Operation) -> None:
        if self._kills != self._tally.kills:
            await self._look_after_a_kill()
        leaves = self._rng.random() < self._leaves
        mine = await operation.run(self._rough, 0, self._chain, self._rng.random() ** 2 * 0.4 if leaves else None)
        if operation.kind in ("response", "conversation", "forget") and self._kills != self._tally.kills:
            return  # killed meanwhile: what is left is looked at before the next of these
        if self._may_be_rolled_back(operation):
            return  # it may have met what was there before, and is looked at before the next one too
        self._note_trail(operation, mine)
        self._note_durability(operation, mine)
        if not self._compares:
            self._note_alone(operation, mine)
        elif operation.kind == "forget":
            self._chain, forgotten = None, self._chain
            theirs = await operation.run(self._calm, 1, forgotten, None)
            if mine is not None and mine.status < 500:
                self._compare(operation, mine, theirs)
        elif mine is None:
            await self._after_a_cut(operation)
        elif mine.status >= 400:
            await self._after_a_refusal(operation, mine)
        else:
            await self._repeat(operation, mine)

    def _note_trail(self, operation: Operation, mine: Outcome | None) -> None:
        """What a failure is told with."""
        came = "cut" if mine is None else f"{mine.status} {mine.code or mine.state or ''}"
        body = {name: value for name, value in (operation.body or {}).items() if name != "messages"}
        when = f"{time.monotonic():.2f} s, kill {self._tally.kills}"
        line = f"{when}: {operation.kind} {came} {operation.source or ''} {body}"
        for session in operation.touches:
            self._trails.setdefault(session, deque(maxlen=24)).append(line)

    def _told(self) -> str:
        """The last operations on each session."""
        return " | ".join(f"{session}: {'; '.join(trail)}" for session, trail in self._trails.items())

    def _note_durability(self, operation: Operation, mine: Outcome | None) -> None:
        """Which sessions may be others after a kill: on a disk that is full at times a change that is not durable holds
        until the server ends, as its answer says, and an empty session is in memory only until something else is done
        to it. What changes nothing makes nothing durable, either."""
        if not operation.changes or (mine is not None and mine.status >= 400):
            return
        if mine is None:
            is_volatile = self._is_lenient and operation.kind not in _SYNCED
        else:
            is_volatile = operation.kind == "create" or not mine.is_durable
        if is_volatile:
            self._volatile |= set(operation.touches)
        elif mine is not None:
            self._volatile -= set(operation.touches)

    def _note_alone(self, operation: Operation, mine: Outcome | None) -> None:
        """Where nothing is compared."""
        if mine is None:
            self._tally.cuts += 1
        elif mine.status < 400:
            operation.note(self._logs, mine)
            self._chain = (mine.response, mine.response) if mine.response is not None else self._chain
        else:
            self._tally.refusals[f"{operation.kind}: {mine.status} {mine.code}"] += 1
        if operation.kind == "forget":
            self._chain = None

    async def _after_a_cut(self, operation: Operation) -> None:
        self._tally.cuts += 1
        if await self._is_like_its_source(operation):
            await asyncio.sleep(_SETTLED)
            await self._forget(operation.touches)
        elif await self._has_happened(operation) and not self._may_be_rolled_back(operation):
            await self._repeat(operation, None)

    async def _after_a_refusal(self, operation: Operation, mine: Outcome) -> None:
        self._tally.refusals[f"{operation.kind}: {mine.status} {mine.code}"] += 1
        if mine.status < 500 and mine.status != 429:
            self._compare(operation, mine, await operation.run(self._calm, 1, self._chain, None))
        elif await self._has_happened(operation) and not self._may_be_rolled_back(operation):
            await self._repeat(operation, None)

    def _may_be_forgotten(self, mine: dict[str, Any] | None, theirs: dict[str, Any] | None) -> bool:
        """The server was killed since it was last looked at, and has forgotten an empty session."""
        return self._kills != self._tally.kills and mine is None and theirs == _EMPTY

    def _may_be_rolled_back(self, operation: Operation) -> bool:
        """The server was killed since it was last looked at, and the operation may have met what was there before a
        change that was not durable: what has come of it is not compared, and goes after the next look."""
        if self._kills == self._tally.kills or not self._volatile & operation.involved:
            return False
        self._volatile |= set(operation.touches)
        return True

    async def _repeat(self, operation: Operation, mine: Outcome | None) -> None:
        """What has happened on the disturbed server happens on the other, and is compared."""
        theirs = await operation.run(self._calm, 1, self._chain, None)
        assert theirs is not None
        if mine is not None:
            self._compare(operation, mine, theirs)
            if mine.response is not None and theirs.response is not None:
                self._chain = mine.response, theirs.response
        operation.note(self._logs, theirs)
        for session in operation.touches:
            await self._compare_sessions(operation, session)

    async def _look_after_a_kill(self) -> None:
        """A restart forgets responses, what conversations said, sessions that are empty, and what was not durable."""
        self._kills, self._chain = self._tally.kills, None
        for client in (self._rough, self._calm):
            await self._until(client, "DELETE", f"/v1/sessions/{self._sessions[0]}-talk")
        rolled_back = set()
        for session in self._sessions:
            theirs = await self._shown(self._calm, session)
            mine = await self._shown(self._rough, session)
            if theirs == _EMPTY and mine is None:
                await self._until(self._calm, "DELETE", f"/v1/sessions/{session}")
            elif mine != theirs and session not in self._volatile:
                self._tally.failures.append(
                    f"{session} is {mine} after kill {self._kills}, not {theirs}: {self._told()}"
                )
            elif mine != theirs:
                rolled_back.add(session)
                for client in (self._rough, self._calm):
                    await self._until(client, "DELETE", f"/v1/sessions/{session}")
        self._tally.rolled_back += len(rolled_back)
        self._volatile = rolled_back  # their deletion may not be durable either

    def _compare(self, operation: Operation, mine: Outcome, theirs: Outcome | None) -> None:
        self._tally.comparisons += 1
        if mine.state:
            self._tally.states[mine.state] += 1
        assert theirs is not None
        if self._is_lenient and operation.kind == "delete" and max(mine.status, theirs.status) <= 404:
            return  # what a write that failed left behind may be there to be deleted
        problem = mine.differs(theirs)
        if problem:
            self._tally.failures.append(f"{operation}: {problem}")

    async def _compare_sessions(self, operation: Operation, session: str) -> None:
        mine, theirs = await self._shown(self._rough, session), await self._shown(self._calm, session)
        self._tally.comparisons += 1
        if mine != theirs and not self._may_be_rolled_back(operation) and not self._may_be_forgotten(mine, theirs):
            self._tally.failures.append(f"{session} is {mine}, not {theirs} after {operation}: {self._told()}")
        self._trails[session].append(f"now {theirs}")

    async def _is_like_its_source(self, operation: Operation) -> bool:
        """A session that another was to replace shows the same numbers as that: nothing tells whether it has."""
        if operation.source is None:
            return False
        found = [await self._shown(self._calm, one) for one in (operation.source, operation.touches[-1])]
        return found[0] == found[1]

    async def _forget(self, sessions: tuple[str, ...]) -> None:
        """Neither server has these any more, unless a disk brings them back."""
        self._volatile |= set(sessions)
        for session in sessions:
            self._logs.pop(session, None)
            for client in (self._rough, self._calm):
                await self._until(client, "DELETE", f"/v1/sessions/{session}")

    async def _has_happened(self, operation: Operation) -> bool:
        """After a cut: whether the disturbed server has carried it out, which nothing but its session tells."""
        if not operation.touches:
            return False
        session = operation.touches[-1]
        deadline = time.monotonic() + PATIENCE
        unchanged = time.monotonic()
        while True:  # a request that was given up ends soon, but not at once, and may not have begun yet
            # a session that is begun is there before anything has happened to it
            is_busy = await self._is_busy(session)
            mine, theirs = await self._shown(self._rough, session), await self._shown(self._calm, session)
            is_turn = operation.kind in ("turn in a session", "conversation")  # which leaves more than an empty session
            has_begun = is_turn and mine in (None, _EMPTY) and theirs in (None, _EMPTY)
            has_changed = mine != theirs and not has_begun and not self._may_be_forgotten(mine, theirs)
            if is_busy or await self._is_busy(session):
                unchanged = time.monotonic()
            elif has_changed:
                return True
            elif time.monotonic() > unchanged + _SETTLED:
                return False
            if time.monotonic() > deadline:
                self._tally.failures.append(f"{session} is in use for ever after {operation} was cut off")
                return False
            await asyncio.sleep(0.05)

    async def _is_busy(self, session: str) -> bool:
        found = await self._get(self._rough, f"/v1/sessions/{session}")
        return found.status_code == 200 and bool(found.json().get("in_use"))

    async def _shown(self, client: httpx.AsyncClient, session: str) -> dict[str, Any] | None:
        found = await self._get(client, f"/v1/sessions/{session}")
        if found.status_code == 404:
            return None
        shown = found.json()
        return {name: shown.get(name) for name in ("commits", "tokens")}

    async def _get(self, client: httpx.AsyncClient, path: str) -> httpx.Response:
        return await self._until(client, "GET", path)

    async def _until(self, client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
        """An answer that tells, however long the server is away.

        Raises:
            NoAnswer: it was away too long.
        """
        deadline, came = time.monotonic() + PATIENCE, ""
        while True:
            try:
                found = await client.request(method, path)
                if found.status_code in (200, 202, 404):
                    return found
                came = f"{found.status_code} {found.text}"
            except httpx.TransportError as error:
                came = repr(error)
            if time.monotonic() > deadline:
                raise NoAnswer(f"{path}: no answer for {PATIENCE:.0f} s, at last {came}")
            await asyncio.sleep(0.05)
