"""What can be looked at while a server runs: banks by slot, tokens in the banks, requests, the config."""

import json

import httpx
import pytest
import torch

from pacellm.config import EngineConfig
from pacellm.memory.state import COUNTERS
from pacellm.server.auth import Keys
from tests.server.conftest import NAME, start

TEXT = "The access code of the amber archive is 48213. " * 60


def ask(server, session, text=TEXT, headers=None, **changes):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    if session is not None:
        body["session_id"] = session
    answer = server.http.post("/v1/chat/completions", json={**body, **changes}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def small():
    """A server whose banks fill and change often."""
    from pacellm.config import PAConfig

    config = EngineConfig(kv_cache_memory=2**28, bank=PAConfig(bank_size=24, segment=64))
    with start(config) as server:
        yield server


def traced(server, session=None, **pacellm):
    return ask(server, session, pacellm={"trace": True, **pacellm})


@pytest.mark.parametrize("pa", ["observe", "reference", "observe_read_only"])
def test_a_trace_tells_what_each_token_found(small, pa):
    answer = traced(small, pa=pa)["pacellm"]
    trace, bank = answer["trace"], answer["bank"]["layers"]
    assert len(trace["tokens"]) == 12
    assert trace["left_out"] == 0
    assert set(trace["layers"]) == set(bank) == {"1", "4"}
    prompt = ask(small, None, max_tokens=0, pacellm={"pa": pa})["pacellm"]["bank"]["layers"]
    for layer, letters in trace["layers"].items():
        assert len(letters) == 11  # the last token is not fed
        for letter, name in zip("hfme", COUNTERS, strict=False):
            assert letters.count(letter) == bank[layer][name] - prompt[layer][name]


def test_a_trace_is_of_the_text(small):
    answer = traced(small)
    assert "".join(answer["pacellm"]["trace"]["tokens"]).strip() == answer["choices"][0]["message"]["content"].strip()
    assert "trace" not in ask(small, None)["pacellm"]
    assert traced(small, pa="off")["pacellm"]["trace"] is None


def test_of_several_choices_the_first_is_traced(small):
    body = {"n": 2, "temperature": 1.5, "seed": 3, "pacellm": {"trace": True}}
    answer = ask(small, None, **body)
    trace = answer["pacellm"]["trace"]
    assert "".join(trace["tokens"]).strip() == answer["choices"][0]["message"]["content"].strip()
    assert trace == ask(small, None, **{**body, "n": 1})["pacellm"]["trace"]


def test_a_trace_changes_nothing(small):
    plain, watched = (
        ask(small, None, temperature=1, seed=5),
        ask(small, None, temperature=1, seed=5, pacellm={"trace": True}),
    )
    assert plain["choices"] == watched["choices"]
    assert plain["pacellm"]["bank"] == watched["pacellm"]["bank"]


def test_a_preempted_answer_is_traced_once(small, monkeypatch):
    whole = traced(small)["pacellm"]["trace"]
    scheduler, steps = small.engine.scheduler, iter(range(1000))
    schedule = type(scheduler).schedule

    def interrupted(self):
        if self.running and self.running[0].num_fed and next(steps) == 4:
            self.preempt(self.running[0])
        return schedule(self)

    monkeypatch.setattr(type(scheduler), "schedule", interrupted)
    before = scheduler.preemptions
    assert traced(small)["pacellm"]["trace"] == whole
    assert scheduler.preemptions == before + 1


def test_a_bank_is_shown_with_who_wrote_it(small):
    ask(small, "seen")
    ask(small, "seen", "And where is it?", pacellm={"append": True})
    session = small.engine.sessions.get(("default", "seen"))
    bank = small.engine.pool.banks(session.row)[1]
    shown = small.http.get("/v1/sessions/seen/banks/1").json()
    filled = int(bank.filled)
    assert (shown["filled"], shown["slots"], shown["writes"]) == (filled, 24, int(bank.clock))
    assert shown["usage"] == bank.usage[:filled].tolist()
    assert [shown["writes"] - age for age in shown["age"]] == shown["stamp"] == bank.stamp[:filled].tolist()
    keys = torch.nn.functional.normalize(bank.keys[:filled].double(), dim=1)
    assert torch.tensor(shown["cosines"]).sub(100 * keys @ keys.T).abs().max() <= 0.51
    assert shown["effective_rank"] == pytest.approx(small.engine.pool.effective_ranks(session.row)[1], abs=1e-3)
    assert {one["stamp"] for one in shown["writers"]} == set(shown["stamp"])
    for one in shown["writers"]:
        ids = list(session.context[one["start"] : one["end"]])
        assert one["text"] == small.service.tokenizer.decode(ids)
        assert one["decoded"] == (
            one["end"] - one["start"] == 1 and one["start"] >= session.log[one["turn"]].prompt_end
        )
    part = small.http.get("/v1/sessions/seen/banks/1", params={"start": 20}).json()
    assert part["usage"] == shown["usage"][20:]
    assert part["cosines"] == [row[20:] for row in shown["cosines"][20:]]


def test_writes_of_a_log_are_as_many_as_the_bank_counted(small):
    """However turns were read, by which preset, and whatever was replaced."""
    ask(small, "long", max_tokens=5)
    ask(small, "long", "Who?", pacellm={"append": True, "pa": "reference"})
    ask(small, "long", "Who?", pacellm={"append": True, "pa": "observe_read_only"})
    ask(small, "long", "Who?", pacellm={"append": True, "pa": "off"})
    ask(small, "long", TEXT[:900] + "?")
    small.http.post("/v1/sessions/long/fork", json={"session_id": "branch"})
    for name in ("long", "branch"):
        shown = small.http.get(f"/v1/sessions/{name}/banks/4").json()
        assert shown["writers"][-1]["stamp"] == max(shown["stamp"]) <= shown["writes"]
        assert {one["stamp"] for one in shown["writers"]} == set(shown["stamp"])


def test_banks_that_are_not_there(small):
    small.http.post("/v1/sessions", json={"session_id": "blank"})
    shown = small.http.get("/v1/sessions/blank/banks/1").json()
    assert (shown["filled"], shown["cosines"], shown["writers"]) == (0, [], [])
    answer = small.http.get("/v1/sessions/blank/banks/0")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "layer")
    assert small.http.get("/v1/sessions/nobody/banks/1").json()["error"]["code"] == "session_not_found"
    ask(small, "dropped")
    small.engine.eviction.evict_one()
    session = small.engine.sessions.get(("default", "dropped"))
    small.engine.pool.release(session.row)
    session.row = None
    answer = small.http.get("/v1/sessions/dropped/banks/1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "banks_away")
    small.http.delete("/v1/sessions/dropped")


def test_ranks_and_parents_outlive_a_restart(tmp_path):
    config = EngineConfig(kv_cache_memory=2**28, session_dir=str(tmp_path))
    with start(config) as server:
        for text in (TEXT, "And?", "And?"):
            ask(server, "root", text, pacellm={"append": text != TEXT})
        assert server.http.post("/v1/sessions/root/fork", json={"session_id": "leaf"}).json()["forked_from"] == "root"
        answer = ask(server, "leaf", "Why?", pacellm={"append": True})
        shown = server.http.get("/v1/sessions/leaf").json()
        for layer, found in shown["bank"]["layers"].items():
            assert len(found["ranks"]) == 4
            assert found["effective_rank"] == found["ranks"][-1]
            reads = answer["pacellm"]["bank"]["layers"][layer]
            assert found["effective_rank"] == pytest.approx(reads["effective_rank"], abs=1e-3)
    with start(config) as server:
        listed = {one["id"]: one for one in server.http.get("/v1/sessions").json()["data"]}
        assert listed["leaf"]["forked_from"] == "root"
        assert "ranks" not in listed["leaf"]["bank"]["layers"]["1"]  # a thousand sessions' would be a megabyte
        assert listed["leaf"]["bank"]["layers"]["1"]["effective_rank"] > 1
        again = server.http.get("/v1/sessions/leaf").json()
        assert again["forked_from"] == "root"
        assert again["bank"] == shown["bank"]
        assert server.http.post("/v1/sessions/leaf/reset").json()["forked_from"] is None


def test_requests_are_listed_while_they_run(live):
    live.wait_until_idle()
    assert live.http.get("/v1/requests").json()["data"] == []
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20_000, "ignore_eos": True,
            "stream": True, "session_id": "running"}  # fmt: skip
    with (
        httpx.Client(base_url=live.url, timeout=30) as other,
        other.stream("POST", "/v1/chat/completions", json=body, headers={"X-Request-ID": "mine"}) as response,
    ):
        lines = response.iter_lines()
        while '"content":"' not in next(lines).replace(" ", ""):
            pass
        told = live.http.get("/v1/requests").json()
        (one,) = told["data"]
        assert (one["status"], one["session_id"], one["request_id"]) == ("generating", "running", "mine")
        assert one["generated"] >= 1
        assert one["read"] == one["to_read"] > 0
        assert told["server"]["running"] == 1
        device = told["server"]["memory"]["device"]
        assert 0 < device["used"] < device["size"]
        assert "hello" not in json.dumps(told)
        assert live.http.post(f"/v1/requests/{one['id']}/cancel").json()["cancelled"] == 1
    live.wait_until_idle()


def test_config_tells_no_secrets(tmp_path):
    config = EngineConfig(kv_cache_memory=2**28, session_dir=str(tmp_path / "folder-17"))
    with start(config, Keys({"key-of-a": "tenant-a"}), metrics_tenant="tenant-a") as server:
        assert server.http.get("/v1/config").status_code == 401
        told = server.http.get("/v1/config", headers={"Authorization": "Bearer key-of-a"})
    for secret in ("key-of-a", "tenant-a", "folder-17"):
        assert secret not in told.text
    assert told.json()["engine"]["keeps_sessions_on_disk"]
    assert told.json()["engine"]["pa_layers"] == [1, 4]
    assert told.json()["model"]["id"] == NAME


def test_a_key_sees_its_own():
    keys = Keys({"key-of-a": "a", "key-of-b": "b"})
    with start(EngineConfig(kv_cache_memory=2**28), keys, metrics_tenant="b") as server:
        a, b = ({"Authorization": f"Bearer key-of-{name}"} for name in "ab")
        ask(server, "hidden", headers=a)
        assert [one["id"] for one in server.http.get("/v1/sessions", headers=a).json()["data"]] == ["hidden"]
        assert server.http.get("/v1/sessions", headers=b).json()["data"] == []
        assert server.http.get("/v1/sessions/hidden/banks/1", headers=b).status_code == 404
        assert server.http.get("/v1/sessions/hidden/banks/1", headers=a).status_code == 200
        assert server.http.get("/v1/requests", headers=a).json()["server"] is None
        assert server.http.get("/v1/requests", headers=b).json()["server"]["queued"] == 0
        for path in ("/v1/requests", "/v1/config", "/v1/sessions/hidden/banks/1"):
            assert server.http.get(path).status_code == 401


@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/requests"])
@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
def test_without_keys_a_proxys_callers_are_told_no_names(live, path, header):
    ask(live, "hidden-17")
    assert live.http.get(path).status_code == 200
    answer = live.http.get(path, headers={header: "192.0.2.7"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "api_keys_needed")
    assert "--api-key" in answer.json()["error"]["message"]
    assert "hidden-17" not in answer.text
