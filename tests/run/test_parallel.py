"""Tensor parallel over processes on a CPU: the tokens of one process, and an end instead of a hang."""

import os
import queue
import signal
import time

import httpx
import pytest
import torch

from load_tests.scenarios.servers import OWN_KEY, own_server
from pacellm.engine.describe import describe
from pacellm.engine.thread import EngineThread
from pacellm.errors import ConfigError, EngineDead, ModelError, RequestError
from pacellm.model.load import load
from pacellm.run import launch
from pacellm.types import Delta, Failed, SamplingParams
from tests.engine.helpers import assert_nothing_held, banks, finish, new_engine, prompt, request, run, tokens
from tests.models import tiny


def checkpoint(family, folder):
    tiny(family).save_pretrained(folder)
    return str(folder)


def turns(engine):
    """Two sessions, one of them asked twice, a fork's worth of copied KV and a preemption."""
    first = run(engine, request("a", prompt(150, 1), session="a"), request("b", prompt(37, 2), session="b"))
    history = prompt(150, 1) + tokens(first["a"]) + prompt(40, 3)
    engine.add(request("again", history, session="a"))
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    second = run(engine)
    return {**first, **second}


@pytest.mark.parametrize("family", ["llama", pytest.param("phi3", marks=pytest.mark.slow)])
def test_two_processes_give_the_tokens_of_one(family, tmp_path):
    path = checkpoint(family, tmp_path)
    alone = new_engine(load(path))
    expected = turns(alone)
    team = launch.start(path, 2, dtype="auto", device="cpu", on_lost=pytest.fail)
    try:
        assert team.model.kv_shapes[0] == ((1, 8), (1, 8)) if family == "llama" else True
        engine = new_engine(team.model)
        found = turns(engine)
        for name in expected:
            assert tokens(found[name]) == tokens(expected[name]), name
        assert finish(found["again"]).session == finish(expected["again"]).session == "resident"
        mine, theirs = finish(found["again"]).bank, finish(expected["again"]).bank
        assert (mine.hits, mine.fuses, mine.merges) == (theirs.hits, theirs.fuses, theirs.merges)
        assert mine.effective_rank == pytest.approx(theirs.effective_rank, rel=1e-3)
        whole, part = banks(alone, "a"), banks(engine, "a")
        for name in whole:
            mine = whole[name] if not whole[name].ndim else whole[name][..., : part[name].shape[-1]]
            torch.testing.assert_close(part[name], mine, rtol=1e-3, atol=1e-4)
        assert_nothing_held(engine)
        with pytest.raises(RequestError, match="tensor-parallel-size"):
            engine.snapshots.export(("tenant", "a"), kv=True, limit=10**9)
        unpatched = new_engine(team.model, pa=False)
        assert len(tokens(run(unpatched, request("x", prompt(30, 5)))["x"])) == 10
        describe(unpatched, path, 100)
        with pytest.raises(ConfigError, match="about one process"):
            new_engine(team.model, exact_products=False)
        with pytest.raises(ConfigError, match="session_dir"):
            new_engine(team.model, session_dir=str(tmp_path / "sessions"))
    finally:
        team.close()
    assert not any(process.is_alive() for process in team.processes)


@pytest.mark.slow
def test_a_user_serves_the_bundled_model_with_two_processes():
    question = "The access code of the amber archive is 48213.\n\nWhat is the access code of the amber archive?"
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
    with own_server(["--tensor-parallel-size", "2", "--kv-cache-memory-bytes", "256M"]) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body, headers={"Authorization": f"Bearer {OWN_KEY}", "X-Session-ID": "x"}, timeout=60,
        ).json()  # fmt: skip
        assert "48213" in answer["choices"][0]["message"]["content"]
        assert answer["pacellm"]["session"] == "new"
        server.stop()
        assert "Traceback" not in server.log()


@pytest.mark.slow
def test_a_dead_rank_ends_the_service(tmp_path):
    """Whoever waits gets an error, and whoever runs the server is told."""
    lost, events = queue.Queue(), queue.Queue()
    team = launch.start(checkpoint("llama", tmp_path), 2, dtype="auto", device="cpu", on_lost=lost.put)
    thread = EngineThread(new_engine(team.model), events.put)
    thread.start()
    try:
        thread.submit(request("x", prompt(20, 1), SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)))
        while not any(isinstance(event, Delta) for _, event in events.get(timeout=60)):
            pass
        os.kill(team.processes[0].pid, signal.SIGKILL)
        assert "rank 1 ended with status -9" in lost.get(timeout=60)
        deadline, last = time.monotonic() + 60, None
        while not isinstance(last, Failed):
            assert time.monotonic() < deadline
            last = events.get(timeout=60)[-1][1]
        assert isinstance(last.error, EngineDead)
        assert not thread.is_alive
    finally:
        thread.stop(5)
        team.close()


@pytest.mark.slow
def test_heads_that_do_not_divide_are_refused(tmp_path):
    path = checkpoint("llama", tmp_path)
    with pytest.raises(ModelError, match="does not divide this model's num_attention_heads, 4"):
        launch.start(path, 3, dtype="auto", device="cpu", on_lost=pytest.fail)
