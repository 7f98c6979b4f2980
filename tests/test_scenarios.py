"""The load scenarios in their small versions against real servers (slow, ``make load``), and their arithmetic."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from load_tests import routing_simulation
from load_tests.scenarios import disturbances
from load_tests.scenarios.books import Books, grown, parse
from load_tests.scenarios.client import Reply
from load_tests.scenarios.disconnects import KINDS, visits
from load_tests.scenarios.kill import leftovers
from load_tests.scenarios.many_sessions import differences
from load_tests.scenarios.operations import Operation, Outcome
from load_tests.scenarios.overload import Ended, judged
from load_tests.scenarios.servers import report
from load_tests.scenarios.talks import make_talk, percentile, spread
from load_tests.scenarios.twins import Tally, Worker

ROOT = Path(__file__).parent.parent
SCENARIOS = (
    "long_beside_short", "many_sessions", "long_histories", "disconnects", "kill", "heavy_bodies", "overload",
    "histories",
)  # fmt: skip
SCRAPE = """\
# TYPE pacellm_sessions gauge
pacellm_sessions{model_name="m"} 3
# TYPE pacellm_session_bytes gauge
pacellm_session_bytes{kind="kv",model_name="m",tier="device"} 7
# TYPE pacellm_steps counter
pacellm_steps_total{model_name="m"} 5
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_loses_nothing_and_leaves_nothing(name):
    done = subprocess.run(
        [sys.executable, "-m", f"load_tests.scenarios.{name}", "--small"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["ok"], found["failures"]
    assert done.returncode == 0
    assert found["scenario"] == name


def test_the_simulation_moves_nothing_that_need_not_move(capsys):
    assert routing_simulation.main(["--small"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert rows["10 table"]["scaled up by half"] == {"strayed": 0, "moved": 0, "strayed_in_the_next_round": 0}
    assert rows["10 ring"]["scaled up by half"]["strayed"] > 0
    assert 0 < rows["10 table"]["a tenth crashed and was replaced"]["moved"] < 200


def test_a_scrape_is_read_by_name_and_labels():
    samples = parse(SCRAPE)
    assert samples["pacellm_sessions"] == 3
    assert samples["pacellm_session_bytes/kv/device"] == 7
    assert grown(Books({}, []), Books(samples, []), "pacellm_steps_total") == 5


def reply(text="right", state="new", cached=0, hits=1):
    return Reply(text=text, pace={"session": state, "cached_tokens": cached, "bank": {"hits": hits}})


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (reply(state="resident"), None),
        (reply(state="restored"), None),
        (reply(text="wrong", state="resident"), "'wrong' instead of 'right'"),
        (reply(state="lost"), "was lost"),
        (reply(state="new"), "was new"),
        (reply(state="resident", hits=2), "banks"),
        (reply(state="resident", cached=5, hits=2), None),
    ],
)
def test_what_a_session_should_not_have_heard_is_named(second, says):
    wrong = differences([[reply(), reply(state="resident")]], [[reply(), second]])
    assert len(wrong) == (says is not None)
    assert says is None or says in wrong[0]


def test_failures_are_the_exit_status_and_in_the_last_line(capsys):
    assert report("x", {"a": 1}, []) == 0
    assert report("x", {"a": 1}, ["left over: y"]) == 1
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last == {"scenario": "x", "ok": False, "num_failures": 1, "failures": ["left over: y"], "a": 1}


def test_what_is_left_of_a_session_directory_is_named(tmp_path):
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "alive").touch()
    assert leftovers(tmp_path) == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "log.safetensors.draft").touch()
    (tmp_path / "servers" / "dead").touch()
    assert leftovers(tmp_path) == ["left over: folder/log.safetensors.draft", "left over: 2 marks of servers"]


def test_a_storm_has_every_kind_of_client():
    talks = [make_talk(seed, 2, 1000) for seed in range(4)]
    storm = visits(talks, 200, seed=0)
    assert visits(talks, 200, seed=0) == storm
    assert {one.stream for one in storm} == {True, False}
    assert {one.kind for one in storm} == set(KINDS)
    assert {one.name for one in storm if one.kind == "chat"} == {None, "storm-0", "storm-1", "storm-2", "storm-3"}
    assert any(one.kind == "response" and one.name and one.until for one in storm)
    assert any(one.share < 1 for one in storm)
    assert all(one.bytes("h", None).count(b"\r\n\r\n") == 1 for one in storm)


def test_spread():
    assert percentile(list(range(100)), 0.99) == 99
    assert spread([0.001, 0.002, 0.004]) == {"median_ms": 2.0, "p99_ms": 4.0, "worst_ms": 4.0}
    assert spread([]) == {}


def test_overload_counts_answers_in_time_and_names_refusals_that_do_not_help():
    good = [Ended(200, 4.0)] * 9 + [Ended(200, 5.5), Ended(504, 5.0)]
    facts, failures = judged([*good, Ended(429, 0.1, "3")], most=1.0, seconds=10, timeout=5.0, share=0.8)
    assert (facts["share_of_capacity"], facts["in_time"], facts["late"], failures) == (0.9, 9, 1, [])
    _, failures = judged([Ended(429, 9.0), Ended(500, 1.0)], most=1.0, seconds=10, timeout=5.0, share=0.8)
    assert failures == [
        "500 after 1.0 s", "a 429 without Retry-After", "refusals took up to 9.0 s", "0 answers in time are 0% of 10",
    ]  # fmt: skip


def operation(kind, *touches, path="", **options):
    return Operation(kind, touches, "POST", path, session=touches[-1], **options)


def twin(*servers):
    """A worker on a disk that is full at times, with sessions w-a to w-c. ``servers``: (commits, tokens) by name."""
    worker = Worker("http://rough", "http://calm", "key", "w", 0, 0.0, Tally(), [], is_lenient=True)

    def client(sessions):
        def answer(request):
            name = request.url.path.split("/")[3]
            if request.method == "DELETE":
                sessions.pop(name, None)
            shown = sessions.get(name)
            return httpx.Response(404) if shown is None else httpx.Response(
                200, json=dict(zip(("commits", "tokens"), shown, strict=True))
            )  # fmt: skip

        return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")

    if servers:
        worker._rough, worker._calm = map(client, servers)
    return worker


def test_only_what_is_written_ends_what_is_not_durable():
    worker, reset = twin(), operation("reset", "w-a")
    worker._note_durability(reset, Outcome(202, is_durable=False))
    for other in (operation("turn in a session", "w-a"), operation("create", "w-a"), operation("refused", "w-a")):
        worker._note_durability(other, Outcome(200))
    assert worker._volatile == {"w-a"}
    worker._note_durability(operation("turn in a session", "w-a", user="hello"), Outcome(200))
    assert worker._volatile == set()
    worker._note_durability(operation("create", "w-b"), Outcome(201))
    worker._note_durability(reset, None)
    assert worker._volatile == {"w-a", "w-b"}


def test_what_a_fork_has_met_after_a_kill_is_in_doubt_where_its_source_is():
    worker = twin()
    fork = operation("fork", "w-b", path="/v1/sessions/w-a/fork")
    worker._volatile, worker._tally.kills = {"w-a"}, 1
    assert worker._may_be_rolled_back(fork)
    assert worker._volatile == {"w-a", "w-b"}
    assert not worker._may_be_rolled_back(operation("fork", "w-c", path="/v1/sessions/w-d/fork"))


def test_what_a_kill_has_changed_is_a_failure_where_it_was_durable():
    rough, calm = {"w-a": (1, 5), "w-b": (1, 7)}, {"w-a": (2, 9), "w-b": (2, 9), "w-c": (0, 0)}
    worker = twin(rough, calm)
    worker._volatile, worker._tally.kills = {"w-b"}, 1
    asyncio.run(worker._look_after_a_kill())
    (failure,) = worker._tally.failures
    assert failure.startswith("w-a is {'commits': 1, 'tokens': 5} after kill 1, not {'commits': 2, 'tokens': 9}")
    assert worker._volatile == {"w-b"}
    assert (rough, calm) == ({"w-a": (1, 5)}, {"w-a": (2, 9)}), "what was not durable, or was never written, is gone"


@pytest.mark.parametrize(("a_step", "says"), [(0, []), (1, ["mib grew from 749 to 799"])])
def test_what_goes_on_growing_is_named(a_step, says):
    held = {"descriptors": 16, "threads": 11, "series": 269}
    samples = [{"requests": 100 * n, "mib": 700 + a_step * n, **held} for n in range(100)]
    assert disturbances.grown(samples) == says
