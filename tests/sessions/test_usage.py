"""Sums and dates of sessions that are kept as they change, against what adding up and looking through would find."""

import random
import threading
import time
from array import array

import pytest
import torch

from pacellm.kv.blocks import BlockAllocator, KVTable
from pacellm.sessions.expiry import _SLACK, ExpiryCalendar
from pacellm.sessions.host_memory import HostMemory
from pacellm.sessions.host_state import HostState
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore
from pacellm.sessions.turn import Turn
from pacellm.sessions.worker import Worker


@pytest.fixture
def store():
    host = HostMemory(0, Worker(pytest.fail, threading.Condition()))
    return SessionStore(BlockAllocator(64), None, host, block_bytes=1, fold_after=10**9)


def of_bytes(count):
    return HostState([torch.empty(count, dtype=torch.uint8)], {}, tokens=1)


def change(session, rng):
    what = rng.choice(["table", "loading", "host", "stub", "stored"])
    values = {
        "table": [None, KVTable()],
        "loading": [False, True],
        "host": [None, of_bytes(7), of_bytes(9)],
        "stub": [False, True],
        "stored": [None, 3, 5],
    }
    setattr(session, what, rng.choice(values[what]))


@pytest.mark.parametrize("seed", range(10))
def test_sums_are_those_of_all_sessions(store, seed):
    rng = random.Random(seed)
    for step in range(400):
        known = list(store)
        kind = rng.random()
        if not known or kind < 0.2:
            store.open((rng.choice("ab"), str(rng.randrange(30))))
        elif kind < 0.3:
            store.remove(rng.choice(known))
        elif kind < 0.35:
            store.add(Session((rng.choice("ab"), str(rng.randrange(30))), stub=True))
        elif kind < 0.4:
            store.close(rng.choice(known), keep=False)
        else:
            change(rng.choice(known), rng)
        now, usage = list(store), store.usage
        assert {tier: count for tier, count in usage.tiers.items() if count} == {
            tier: sum(session.tier == tier for session in now) for tier in {session.tier for session in now}
        }
        assert usage.host_bytes == sum(session.host.nbytes for session in now if session.host)
        stored = [session.stored for session in now if session.stored is not None]
        assert (usage.stored, usage.stored_tokens) == (len(stored), sum(stored)), step
        for tenant in "ab":
            assert store.count(tenant) == sum(session.key[0] == tenant for session in now)
            assert store.of(tenant) == [session for session in reversed(now) if session.key[0] == tenant]


def test_sessions_expire_when_they_were_not_used(store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    short, used, busy, plain = (store.open(("a", name)) for name in ("short", "used", "busy", "plain"))
    for session in (short, used, busy):
        session.ttl = 100
    busy.busy = True
    short.ttl = 10  # an earlier time than the one it had
    now[0] += 11
    assert store.expired() == [short]
    store.remove(short)
    now[0] += 60
    store.touch(used)
    assert store.expired() == []
    now[0] += 60
    assert store.expired() == []
    busy.busy = False
    now[0] += 2
    assert store.expired() == [busy]
    now[0] += 2
    assert store.expired() == [busy]  # until it has gone
    store.remove(busy)
    now[0] += 100
    assert store.expired() == [used]
    assert plain.expires is None


def test_looking_for_the_expired_costs_nothing_where_none_are(store, monkeypatch):
    for number in range(2000):
        store.open(("a", str(number))).ttl = 3600
    monkeypatch.setattr(Session, "expires", property(lambda session: pytest.fail("looked at")))
    assert store.expired() == []


def test_a_calendar_keeps_nothing_of_sessions_that_are_gone():
    calendar = ExpiryCalendar()
    for number in range(10_000):
        session = Session(("a", str(number)), ttl=1e6, log=[Turn(0, 1, array("i", [1]), "off")])
        calendar.note(session)
        calendar.forget(session)
    assert not calendar._noted
    assert not calendar._current
    assert len(calendar._entries) <= _SLACK + 1
