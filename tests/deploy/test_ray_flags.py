"""Flags under Ray Serve, and what a replica reports; without Ray."""

import threading

import pytest

from deploy.ray.flags import parse_flags
from deploy.ray.report import held_sessions
from deploy.ray.table import digest
from pacellm.errors import ConfigError
from pacellm.kv.blocks import BlockAllocator
from pacellm.sessions.host_memory import HostMemory
from pacellm.sessions.session import Session
from pacellm.sessions.store import SessionStore
from pacellm.sessions.worker import Worker


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "80"], "http_options.port"),
        (["--host=0.0.0.0"], "http_options.host"),
        (["--shutdown-timeout", "3"], "graceful_shutdown_timeout_s"),
        (["--session-dir", "x"], "--session-sync"),
        (["--no-such-flag"], "not understood"),
    ],
)
def test_what_cannot_work_is_named(flags, says):
    with pytest.raises(ConfigError, match=says):
        parse_flags(flags)


def test_unknown_names_are_named():
    with pytest.raises(ConfigError, match="num_replica"):
        parse_flags([], unknown=["num_replica"])


def test_flags_are_those_of_serve():
    options = parse_flags(["--session-dir", "x", "--session-sync", "--max-num-seqs", "3"])
    assert (options.session_sync, options.max_num_seqs) == (True, 3)


def test_sessions_on_disk_alone_are_not_reported():
    store = SessionStore(
        BlockAllocator(4), None, HostMemory(0, Worker(pytest.fail, threading.Condition())), block_bytes=1, fold_after=10
    )
    for name, facts in {"here": {"commits": 2, "generation": 2}, "disk": {"commits": 1, "stub": True},
                        "begins": {"busy": True}, "nothing": {}}.items():  # fmt: skip
        store.add(Session(("t", name), **facts))
    assert held_sessions(store) == [(digest("t", "begins"), 0), (digest("t", "here"), 2)]
