"""How a waiting request begins: what is to be fed, and on which state. No torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from pacellm.config import Preset
from pacellm.engine.sequence import Lineage, Sequence
from pacellm.kv.prefix import Entry, PrefixCache
from pacellm.modes import resolve
from pacellm.sessions.history import kinship
from pacellm.sessions.session import Session
from pacellm.sessions.turn import Turn, common_prefix


@dataclass(frozen=True)
class Plan:
    """How a waiting sequence begins.

    Attributes:
        lineage: what its first token is fed on.
        work: turns to feed; ``index`` numbers the first among the turns since the lineage's beginning, and ``cursor``
            tokens of it are in place.
        position: tokens of KV in place, in ``blocks``.
        row: banks to go on from, None for the origin's or empty ones.
        entry: the kept progress that is used.
    """

    lineage: Lineage
    work: list[Turn]
    index: int
    cursor: int
    position: int
    blocks: list[int]
    row: int | None
    entry: Entry | None


class Planner:
    """Chooses between a session's state, kept progress and the log.

    Args:
        progress: kept prefill progress.
        preset: the banks' where requests name none; None where there are no banks.
        density: of requests that do not say.
    """

    def __init__(self, progress: PrefixCache, *, preset: Preset | None, density: float = 1.0) -> None:
        self._progress, self._preset, self._density = progress, preset, density

    def plan(self, sequence: Sequence, session: Session | None) -> Plan:
        """What to feed, and on which state: the session's, kept progress, or none with the log before."""
        lineage = _lineage(sequence, session)
        log = session.log if session is not None else []
        own = self.own_turn(sequence, session)
        turns = [*log, own]
        is_scored = sequence.request.sampling.prompt_logprobs is not None  # every row of the prompt is needed
        entry = None if is_scored else self._progress.find(lineage, turns)
        is_best = entry is None or entry.index < len(log)
        if session is not None and session.is_resident and session.table is not None and is_best:
            return Plan(lineage, [own], len(log), 0, own.start, session.table.blocks, session.row, None)
        if entry is None:
            return Plan(lineage, turns, 0, 0, 0, [], None, None)
        cursor = len(entry.ids)
        return Plan(
            lineage, turns[entry.index :], entry.index, cursor, entry.position, entry.table.blocks, entry.row, entry
        )

    def own_turn(self, sequence: Sequence, session: Session | None) -> Turn:
        """The request's own tokens, from where they part from the session's."""
        start = 0
        if session is not None:
            start = min(common_prefix(sequence.prompt, session.context), len(sequence.prompt) - 1)
        ids = sequence.prompt[start:] + array("i", sequence.generated)
        asked = sequence.request.ce_density
        density = round(1e6 * (self._density if asked is None else asked)) / 1e6
        mode = resolve(sequence.request.pa, self._preset) if self._preset is not None else "off"
        return Turn(start, len(sequence.prompt), ids, mode, density)

    def has_own_progress(self, sequence: Sequence, session: Session) -> bool:
        """Kept progress makes the session's own state unnecessary."""
        entry = self.plan(sequence, session).entry
        return entry is not None and entry.index == len(session.log)


def describe(sequence: Sequence, session: Session | None, plan: Plan) -> None:
    """Note on the sequence what was found of its session."""
    is_replayed = len(plan.work) > 1
    sequence.replayed = sum(len(turn.ids) for turn in plan.work[:-1]) - (plan.cursor if is_replayed else 0)
    sequence.cached = 0 if is_replayed else plan.position
    sequence.kinship = kinship(sequence.prompt, session)
    if session is not None and session.note is not None:
        sequence.note = session.note
    if session is None:
        sequence.session_status = "none"
    elif sequence.replayed:
        sequence.session_status = "replayed"
    elif session.found is not None:
        sequence.session_status, session.found = session.found, None
    elif session.status == "lost":
        sequence.session_status = "lost"
    elif session.commits:
        sequence.session_status = "resident"
    else:
        sequence.session_status = session.status


def _lineage(sequence: Sequence, session: Session | None) -> Lineage:
    key = sequence.request.session
    if key is None:
        return sequence.request.tenant, None, 0
    if session is None or not (session.log or session.origin):
        return key[0], None, 0  # an empty session is where everybody begins
    return key[0], key, session.generation
