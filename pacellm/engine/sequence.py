"""One request's tokens and status, and the turns that its session's log is made of. No torch."""

from __future__ import annotations

import dataclasses
import enum
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pacellm.kv.blocks import KVTable
from pacellm.memory.trace import TokenTrace
from pacellm.sessions.ending import Ending
from pacellm.sessions.session import Session
from pacellm.sessions.turn import Turn
from pacellm.types import FinishReason, GenerationRequest, Kinship, Matcher, Passage, SessionStatus
from pacellm.view import Recall

if TYPE_CHECKING:
    import numpy as np

Lineage = tuple[str, tuple[str, str] | None, int]
"""What a request's first token is fed on: (tenant, session or None, the session's generation)."""


class Status(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(frozen=True)
class CountsBefore:
    """What a row had counted at some point of a history: the same whoever fed it, and however often.

    Attributes:
        counters: lifetime counters of its banks by layer.
        activity: [L, E] int64 of its experts; None without a layout.
    """

    counters: dict[int, list[int]]
    activity: Any


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
        request: as it came.
        prompt: its ids as an array; of a request that appends, once it is bound.
        bound: generation of the session that such a prompt was made from.
        tools: digest of the tools that the prompt shows. ending: how its session's history ends if it is committed.
        kinship: what the prompt has of its session's history.
        generated: sampled ids, the last of which has not been fed.
        work: turns still to feed: those of the log that must be replayed, then the request's own.
        index: number of ``work[0]`` among the turns since the lineage's beginning.
        cursor: tokens of ``work[0]`` fed so far.
        table, row: the working copy: KV blocks and bank row.
        is_branch: a further choice of another request: it commits nothing and shares that one's session.
        num_branches: choices that will go on from this one's prompt.
        claimed: the session directory was asked about its session.
        due: prompt tokens that it has to feed, as (position, how many); None until a request with a deadline asks.
        forecast: seconds from arrival to its end, as they were expected when it came.
        note: what was refused on the way to its session's state.
        session: the one it works on, while it runs.
        matcher: where it is in what its answer is constrained to, once it was asked.
        num_scored: prompt tokens after the first whose log-probability was reported.
        before: where its own turn began; of a further choice, where its prompt ended.
        question: positions of what is asked, which chooses what is called back; None where the prompt fits its budget.
        history_end: position that its history may reach; 0 where none was promised.
        recall: what was called back; it outlives a preemption. passages: of it what was voted for most.
        is_watched: what its decoded tokens attend to is measured.
        trace: what its decoded tokens find in the banks, where that is asked for.
        working_sets: by layer the experts that its decoded tokens use, as long as they are known.
        cached, replayed: prompt tokens not computed again; tokens of the log that are.
    """

    request: GenerationRequest
    prompt: array[int]
    max_tokens: int
    seed: int
    status: Status = Status.WAITING
    generated: list[int] = field(default_factory=list)
    work: list[Turn] = field(default_factory=list)
    index: int = 0
    cursor: int = 0
    lineage: Lineage | None = None
    table: KVTable = field(default_factory=KVTable)
    row: int | None = None
    session: Session | None = None
    session_status: SessionStatus = "none"
    matcher: Matcher | None = None
    num_scored: int = 0
    cached: int = 0
    replayed: int = 0
    total_work: int = 0
    done_work: int = 0
    before: CountsBefore | None = None
    question: range | None = None
    recall: Recall | None = None
    history_end: int = 0
    passages: tuple[Passage, ...] = ()
    is_watched: bool = False
    trace: TokenTrace | None = None
    working_sets: dict[int, Any] = field(default_factory=dict)
    admitted_at: float | None = None
    first_token_at: float | None = None
    due: tuple[int, int] | None = None
    forecast: float | None = None
    is_branch: bool = False
    num_branches: int = 0
    claimed: bool = False
    bound: int | None = None
    tools: int = 0
    ending: Ending | None = None
    kinship: Kinship = field(default_factory=Kinship)
    note: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def turn(self) -> Turn:
        """The turn being fed."""
        return self.work[0]

    @property
    def position(self) -> int:
        """Absolute position of the next token to feed."""
        return self.turn.start + self.cursor

    @property
    def place(self) -> int:
        """Tokens before it that it may see, at most."""
        return self.table.place(self.position)

    @property
    def pending(self) -> int:
        """Known tokens not yet fed."""
        return self.total_work - self.done_work

    @property
    def is_asking(self) -> bool:
        """Its next tokens are the question whose answer is what they see."""
        return self._asks_at == self.position

    @property
    def _asks_at(self) -> int | None:
        """The position at which it will be chosen what is called back; None where it is, or nothing is."""
        if self.question is None or len(self.work) != 1 or self.turn.recall is not None:
            return None
        return self.question.start

    @property
    def promised_history(self) -> int:
        """Tokens of history that it may still add."""
        return max(0, self.history_end - self.table.history.tokens)

    @property
    def horizon(self) -> int:
        """The position before which its known tokens see alike."""
        position, ends = self.position, [self.turn.end]
        for bound in (self.turn.next_view(position), self._asks_at):
            if bound is not None and bound > position:
                ends.append(bound)
        return min(ends)

    def outgrow(self) -> None:
        """An answer that outgrows its budget sees what is most recent."""
        budget = self.turn.budget
        if budget is not None and self.turn.recall is None and self.position >= budget.tokens:
            self.recalls(Recall.recent(budget))

    def recalls(self, recall: Recall) -> None:
        """What is called back for its question, or for the rest of its answer, was chosen."""
        self.recall = self.turn.recall = recall

    @property
    def num_fed(self) -> int:
        """Tokens of its answer that were fed."""
        return max(0, self.position - self.turn.prompt_end) if len(self.work) == 1 else 0

    @property
    def is_running(self) -> bool:
        """It has a working copy and is not complete."""
        return self.status is Status.RUNNING and self.finish_reason is None

    @property
    def is_decoding(self) -> bool:
        """One known token is left, and it was sampled."""
        return self.pending == 1 and bool(self.generated)

    def begin(self, work: list[Turn], now: float, *, index: int = 0, cursor: int = 0) -> None:
        """Start, or start again after a preemption, with ``work`` to feed from ``cursor`` on."""
        self.work, self.index, self.cursor = work, index, cursor
        self.total_work, self.done_work = sum(len(turn.ids) for turn in work) - cursor, 0
        self.status = Status.RUNNING
        if self.admitted_at is None:
            self.admitted_at = now

    def advance(self, count: int) -> bool:
        """``count`` tokens were fed. True where the request's last known token was among them."""
        self.cursor += count
        self.done_work += count
        if self.cursor == len(self.turn.ids) and len(self.work) > 1:
            self.work.pop(0)
            self.index += 1
            self.cursor = 0
        return self.pending == 0

    def append(self, token: int) -> None:
        """A token was sampled; it is the next to feed."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.generated.append(token)
        self.turn.ids.append(token)
        self.total_work += 1

    def allowed(self, size: int) -> np.ndarray | None:
        """[size] bool: the tokens that may come next; None where all may.

        Raises:
            RequestError: the constraint fails here.
        """
        if self.request.constraint is None:
            return None
        if self.matcher is None:
            self.matcher = self.request.constraint.new_matcher()
        return self.matcher.allowed(self.generated, size)

    @property
    def is_complete(self) -> bool:
        """Its constraint lets nothing follow."""
        return self.matcher is not None and self.matcher.is_complete(self.generated)

    def fed(self) -> Turn:
        """The request's own turn as it enters the log: without the last sampled token, which was never fed."""
        turn = self.turn
        return dataclasses.replace(turn, ids=turn.ids[: self.cursor])
