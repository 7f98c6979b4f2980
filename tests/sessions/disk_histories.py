"""Histories of a server on a disk that fails and a process that dies, and what may be seen of them.

What a client may count on with synced commits, on one server: a change that was answered, without ``durable: false``,
is there after the process died; one that was answered with it holds until then; a request that failed has changed
nothing, unless it says that it may have; one that nobody has heard the end of has changed nothing, or all that it would
have.
"""

import errno
import random
from dataclasses import dataclass

from pacellm.engine.engine import run_until_idle
from pacellm.errors import SessionConflict, SessionDeleted, SessionExists, SessionNotFound
from pacellm.types import Failed, SamplingParams
from tests.engine.helpers import crash, new_engine, prompt, request
from tests.sessions.failing_disk import CALLS, FailingDisk

NAMES = "ab"
EMPTY = (0, ())
ANSWER = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
ERRORS = (errno.ENOSPC, errno.EIO)
Where = int | str | tuple[str, str] | None
KINDS = {
    "turn": 12, "peek": 3, "reset": 4, "delete": 5, "fork": 4, "create": 2, "evict": 3, "retry": 2, "show": 2,
    "kill": 2, "close": 1, "race": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        number: makes its prompt unlike others.
        fails, error, dies: see :meth:`FailingDisk.begin`; the process dies when the operation has ended at the latest.
        looks: at all sessions afterwards, when nothing fails.
    """

    kind: str
    name: str = "a"
    other: str = "b"
    number: int = 0
    fails: Where = None
    error: int = errno.EIO
    dies: Where = None
    looks: bool = False


def draw(seed, length):
    """A history."""
    rng, found, is_full = random.Random(seed), [], False
    for number in range(length):
        is_full = rng.random() < (0.6 if is_full else 0.2)
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        dies = rng.randrange(14) if kind == "kill" or rng.random() < 0.08 else None
        found.append(
            Op(kind, *rng.sample(NAMES, 2), number, "full" if is_full else _fault(rng), rng.choice(ERRORS), dies,
               looks=rng.random() < 0.3)
        )  # fmt: skip
    return found


def _fault(rng):
    chance = rng.random()
    if chance < 0.3:
        return rng.randrange(14)
    return rng.choice(CALLS) if chance < 0.36 else None


class Wrong(AssertionError):
    """Something that may not be."""


class History:
    """A server, and what its sessions may be: None where there is none, else (commits, the last prompt).

    Args:
        longer: tokens that prompts have beside a few.

    Attributes:
        live: what a session may be in this process. kept: what it may be in the next, should this one die; the same set
            where whatever it is is on disk.
    """

    def __init__(self, model, path, monkeypatch, *, longer=0, **settings):
        self._model, self._path, self._settings = model, path, settings
        self._longer = longer
        self.disk = FailingDisk(path)
        self.disk.install(monkeypatch)
        self._begin()
        self.live = {name: {None} for name in NAMES}
        self.kept = dict(self.live)
        self.trail = []

    def _begin(self):
        self.engine = new_engine(
            self._model, session_dir=str(self._path), session_sync=True, kv_cache_memory=2**21, **self._settings
        )

    def run(self, ops):
        for op in ops:
            self.disk.begin(op.fails, op.dies, op.error)
            self._is_race = op.kind == "race"
            came = getattr(self, f"_{op.kind}")(op)
            self.trail.append((op, came, list(self.disk.failed)))
            self.disk.calm()
            if op.dies is not None:
                self._restart()
            self._glance()
            if op.looks:
                self.look()
        self._restart()
        self.look()
        crash(self.engine)

    # -- operations ----------------------------------------------------------------------------------------

    def _turn(self, op):
        contexts = sorted(state[1] for state in self.live[op.name] if state is not None)
        asked = [*(contexts[-1] if contexts else ())[-40:], *self._prompt(op)]
        new = {((state or EMPTY)[0] + 1, tuple(asked)) for state in self.live[op.name]}
        return self._changed(op.name, new, self._ask(op.name, asked), {*self.live[op.name]})

    def _peek(self, op):
        return self._ask(op.name, self._prompt(op), commit=False)

    def _prompt(self, op):
        return prompt(5 + self._longer, op.number)

    def _ask(self, name, asked, **options):
        self.engine.add(request("x", asked, ANSWER, session=name, **options))
        return self._turned(run_until_idle(self.engine)["x"])

    def _turned(self, events):
        end = events[-1]
        if isinstance(end, Failed) and isinstance(end.error, SessionDeleted):
            return "deleted"
        return self._excused(end.error) if isinstance(end, Failed) else "done"

    def _reset(self, op):
        came = self._operate(self.engine.ops.reset(("tenant", op.name)))
        return self._changed(op.name, {EMPTY}, came, {state for state in self.live[op.name] if state is not None})

    def _delete(self, op):
        came = self._operate(self.engine.ops.delete(("tenant", op.name)))
        if came == "not durable" or self.disk.is_dead:
            # its log may have made room for a tombstone that was not written then
            self.kept[op.name] = self.kept[op.name] | {EMPTY}
        # what failed before may have left something to delete where no session is
        return self._changed(op.name, {None}, came, self.live[op.name])

    def _create(self, op):
        came = self._operate(self.engine.ops.create(("tenant", op.name), None))
        # it is written when the session leaves memory
        came = "not durable" if came == "done" else came
        return self._changed(op.name, {EMPTY}, came, self.live[op.name] & {None})

    def _fork(self, op):
        came = self._operate(self.engine.ops.fork(("tenant", op.other), ("tenant", op.name), None))
        if came == "exists":
            self._only(op.name, lambda state: state is not None, came)
            return came
        if came == "absent":
            self._only(op.other, lambda state: state is None, came)
            return came
        new = {state for state in self.live[op.other] if state is not None}
        return self._changed(op.name, new, came, self.live[op.name] & {None})

    def _evict(self, op):
        self.engine.eviction.evict_one()
        for session in self.engine.sessions:
            if not session.in_use and session.log and op.number % 2:
                self.engine.mover.spill_log(session)
        run_until_idle(self.engine)

    def _retry(self, op):
        self.engine.mover.files.deletions._next_try = 0
        self.engine.step()
        run_until_idle(self.engine)

    def _show(self, op):
        came, found = self._shown(op.name)
        if came in ("done", "absent"):
            self._only(op.name, lambda state: state == found, "show")
        return came

    def _kill(self, op):
        return None

    def _close(self, op):
        if op.dies is None:
            self.engine.close()
            if self.disk.failed:
                self.kept = {name: states | self.live[name] for name, states in self.kept.items()}
            else:
                self.kept = self.live
            self.disk.calm()
            self._follow()

    def _race(self, op):
        """A request, and a deletion or a reset before it has ended."""
        asked, before = self._prompt(op), set(self.live[op.name])
        is_deletion, key = op.number % 2, ("tenant", op.name)
        self.engine.add(request("x", asked, ANSWER, session=op.name))
        events = [event for _ in range(op.number % 5) for _, event in self.engine.step()]
        future = self.engine.call(self.engine.ops.delete(key) if is_deletion else self.engine.ops.reset(key))
        events += run_until_idle(self.engine).get("x", [])
        came, turned = self._told(future)[0], self._turned(events)
        found = self._after_race({None if is_deletion else EMPTY}, tuple(asked), before, came, turned)
        if self.disk.is_dead:
            self.kept[op.name] = self.kept[op.name] | found | {EMPTY}
        elif came == "not durable" or turned == "unsettled":
            self.live[op.name], self.kept[op.name] = found, self.kept[op.name] | found | {EMPTY}
        elif came == "done" or turned == "done":
            self.live[op.name] = self.kept[op.name] = found
        return f"{came}, {turned}"

    def _after_race(self, ended, asked, before, came, turned):
        """What a session may be: whichever was first has been carried out first."""
        has_changed, has_committed = came in ("done", "not durable", "cut"), turned in ("done", "unsettled", "cut")
        found = set(ended) if has_changed else set()
        if has_committed:
            found |= {(1, asked)}
            found |= {((state or EMPTY)[0] + 1, asked) for state in before} if came != "done" else set()
        if not has_changed and turned != "done":
            found |= before
        return found

    # -- what came -----------------------------------------------------------------------------------------

    def _operate(self, operation):
        return self._result(operation)[0]

    def _result(self, operation):
        future = self.engine.call(operation)
        run_until_idle(self.engine)
        return self._told(future)

    def _told(self, future):
        try:
            found = future.result(1)
        except SessionNotFound:
            return "absent", None
        except SessionExists:
            return "exists", None
        except Exception as error:
            return self._excused(error), None
        if isinstance(found, dict) and found.get("durable") is False:
            if not (self.disk.failed or self.disk.is_dead):
                self._wrong("not durable, though nothing has failed")
            return "not durable", found
        return "done", found

    def _excused(self, error):
        """An error is one of the disk's, or nobody has heard of it."""
        if self.disk.is_dead:
            return "cut"
        # what a reset has left unsettled is asked about before the next request, not before one that waits for it
        is_unsettled = not {"sync folder", "replace"}.isdisjoint(call for call, _ in self.disk.failed)
        if isinstance(error, SessionConflict) and not (self._is_race and is_unsettled):
            self._wrong(f"there is no other server: {error}")
        if not self.disk.failed:
            self._wrong(f"nothing has failed, but: {error!r}")
        return "unsettled" if "may be there all the same" in str(error) else "failed"

    def _changed(self, name, new, came, was):
        """An operation that makes ``new`` of a session that was one of ``was``."""
        if self.disk.is_dead:
            self.kept[name] = self.kept[name] | new
            return "cut"
        if came in ("done", "not durable"):
            if not was:
                self._wrong(f"{name} cannot have been changed: it was {self.live[name]}")
            self.live[name] = set(new)
            self.kept[name] = self.live[name] if came == "done" else self.kept[name] | new
        elif came == "unsettled":
            # one that was only made is not on disk, where it is looked for from then on
            self.live[name] = self.live[name] | new | ({None} if EMPTY in self.live[name] else set())
            self.kept[name] = self.kept[name] | self.live[name]
        elif came == "absent":
            self._only(name, lambda state: state is None, came)
        elif came == "exists":
            self._only(name, lambda state: state is not None, came)
        return came

    def _only(self, name, holds, why):
        if self.disk.is_dead:
            return
        left = {state for state in self.live[name] if holds(state)}
        if not left:
            self._wrong(f"{name} is {self.live[name]}, not {why}")
        self.live[name].intersection_update(left)

    # -- looking -------------------------------------------------------------------------------------------

    def _restart(self):
        crash(self.engine)
        self.disk.calm()
        self._follow()

    def _follow(self):
        """The next process."""
        self.live = dict(self.kept)
        self._begin()

    def _shown(self, name):
        """(what came, the session)."""
        key = ("tenant", name)
        came, _ = self._result(self.engine.ops.show(key))
        if came != "done":
            return came, None
        session = self.engine.sessions.get(key)
        return came, _state(session)

    def _glance(self):
        """What memory has is something that may be; the directory may know better, and is asked before others are."""
        for name in NAMES:
            session = self.engine.sessions.get(("tenant", name))
            if session is None or session.stub or not (session.commits or session.kept):
                continue
            if _state(session) not in self.live[name]:
                self._wrong(f"{name} is {self.live[name]}, not what memory has: {_state(session)}")

    def look(self):
        """Every session, as it is shown."""
        for name in NAMES:
            came, found = self._shown(name)
            if came not in ("done", "absent"):
                self._wrong(f"{name} cannot be shown: {came}")
            self._only(name, lambda state: state == found, f"what is shown: {found}")  # noqa: B023

    def _wrong(self, what):
        told = "\n".join(f"  {op.kind} {op.name}{op.other} fails={op.fails} dies={op.dies} looks={op.looks}: "
                         f"{came} {failed}" for op, came, failed in self.trail[-12:])  # fmt: skip
        raise Wrong(f"{what}; this call: {self.disk.failed}\n{told}")


def _state(session):
    return session.commits, tuple(session.context[:-1])
