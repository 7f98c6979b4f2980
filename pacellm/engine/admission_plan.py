"""How a waiting request begins: what is to be fed, and on which state. No torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from pacellm.config import Preset
from pacellm.engine.sequence import Lineage, Sequence
from pacellm.kv.blocks import KVTable
from pacellm.kv.prefix_cache import CachedPrefix, PrefixCache
from pacellm.modes import resolve
from pacellm.sessions.history import kinship
from pacellm.sessions.session import Session
from pacellm.sessions.turn import Turn, common_prefix
from pacellm.types import SessionStatus
from pacellm.view import Budget

_VOTERS = 128  # tokens of a question, its last ones


@dataclass(frozen=True)
class AdmissionPlan:
    """How a waiting sequence begins.

    Attributes:
        lineage: what its first token is fed on.
        work: turns to feed; ``index`` numbers the first among the turns since the lineage's beginning, and ``cursor``
            tokens of it are in place.
        position: tokens of KV in place, in ``table``.
        row: banks to go on from, None for the origin's or empty ones.
        prefix: the cached prefix that is used.
    """

    lineage: Lineage
    work: list[Turn]
    index: int
    cursor: int
    position: int
    table: KVTable
    row: int | None
    prefix: CachedPrefix | None


class AdmissionPlanner:
    """Chooses between a session's state, a cached prefix and the log.

    Args:
        prefix_cache: prefixes of prompts that were computed before.
        preset: the banks' where requests name none; None where there are no banks.
        density: of requests that do not say.
        budget: of what their tokens see; None is no limit.
    """

    def __init__(
        self,
        prefix_cache: PrefixCache,
        *,
        preset: Preset | None,
        density: float = 1.0,
        budget: Budget | None = None,
    ) -> None:
        self._prefix_cache, self._preset, self._density, self._budget = prefix_cache, preset, density, budget

    def plan(self, sequence: Sequence, session: Session | None) -> AdmissionPlan:
        """What to feed, and on which state: the session's, a cached prefix, or none with the log before."""
        lineage = _lineage(sequence, session)
        log = session.log if session is not None else []
        own = self.own_turn(sequence, session)
        turns = [*log, own]
        is_scored = sequence.request.sampling.prompt_logprobs is not None  # every row of the prompt is needed
        sees = self.question(sequence)
        prefix = None if is_scored else self._prefix_cache.find(lineage, turns, sees.start if sees else None)
        is_best = prefix is None or prefix.index < len(log)
        if session is not None and session.is_resident and session.table is not None and is_best:
            return AdmissionPlan(lineage, [own], len(log), 0, own.start, session.table, session.row, None)
        if prefix is None:
            return AdmissionPlan(lineage, turns, 0, 0, 0, KVTable(), None, None)
        return AdmissionPlan(
            lineage,
            turns[prefix.index :],
            prefix.index,
            len(prefix.ids),
            prefix.position,
            prefix.table,
            prefix.row,
            prefix,
        )

    def own_turn(self, sequence: Sequence, session: Session | None) -> Turn:
        """The request's own tokens, from where they part from the session's."""
        start = 0
        if session is not None:
            start = min(common_prefix(sequence.prompt, session.context), len(sequence.prompt) - 1)
            if (question := self.question(sequence)) is not None:
                start = min(start, question.start)
        ids = sequence.prompt[start:] + array("i", sequence.generated)
        asked = sequence.request.ce_density
        density = round(1e6 * (self._density if asked is None else asked)) / 1e6
        mode = resolve(sequence.request.pa, self._preset) if self._preset is not None else "off"
        return Turn(start, len(sequence.prompt), ids, mode, density, self._budget, sequence.recall)

    def question(self, sequence: Sequence) -> range | None:
        """Positions of the tokens that choose what is called back; None where a prompt fits its budget or is only read.

        They lie beyond the budget: what lies within sees everything before it anyway.
        """
        length = len(sequence.prompt)
        if self._budget is None or length <= self._budget.tokens or sequence.max_tokens == 0:
            return None
        outline = sequence.request.outline
        count, behind = outline.question or (_VOTERS, outline.opening)
        end = max(self._budget.tokens, length - behind)
        return range(max(self._budget.tokens, end - min(count, _VOTERS)), end)

    def needs_state(self, sequence: Sequence, session: Session) -> bool:
        """The session's own state is needed: no prefix goes beyond it."""
        prefix = self.plan(sequence, session).prefix
        return prefix is None or prefix.index < len(session.log)


def note_findings(sequence: Sequence, session: Session | None, plan: AdmissionPlan) -> None:
    """Note on the sequence what was found of its session."""
    is_replayed = len(plan.work) > 1
    sequence.replayed = sum(len(turn.ids) for turn in plan.work[:-1]) - (plan.cursor if is_replayed else 0)
    sequence.cached = 0 if is_replayed else plan.position
    sequence.kinship = kinship(sequence.prompt, session)
    if session is not None and session.note is not None:
        sequence.note = session.note
    sequence.session_status = "none" if session is None else _status(session, is_replayed=bool(sequence.replayed))


def _status(session: Session, *, is_replayed: bool) -> SessionStatus:
    """What a request is told of its session; where its state came from is told once."""
    if is_replayed:
        return "replayed"
    if session.found is not None:
        found, session.found = session.found, None
        return found
    return "resident" if session.commits and session.status != "lost" else session.status


def _lineage(sequence: Sequence, session: Session | None) -> Lineage:
    key = sequence.request.session
    if key is None:
        return sequence.request.tenant, None, 0
    if session is None or not (session.log or session.origin):
        return key[0], None, 0  # an empty session is where everybody begins
    return key[0], key, session.generation
