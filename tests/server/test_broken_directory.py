"""A session directory that takes nothing, as clients see it."""

from pacellm.config import EngineConfig
from tests.server.conftest import start
from tests.server.test_sessions import ask
from tests.sessions.broken_disk import break_disk


def test_a_full_directory_costs_durability_alone_and_says_so(tmp_path, monkeypatch):
    with start(EngineConfig(kv_cache_memory=2**28, session_dir=str(tmp_path))) as live:
        assert ask(live.http, "s").status_code == 200
        with monkeypatch.context() as patch:
            break_disk(patch, "full")
            assert ask(live.http, "s").json()["pacellm"]["session"] == "resident"
            assert ask(live.http, "t").json()["pacellm"]["note"] is None
            answers = [
                live.http.post("/v1/sessions/s/fork", json={"session_id": "u"}),
                live.http.post("/v1/sessions/u/reset"),
                live.http.put("/v1/sessions/v/snapshot", content=live.http.get("/v1/sessions/s/snapshot").content),
                live.http.delete("/v1/sessions/s"),
                live.http.delete("/v1/sessions"),
            ]
            assert ask(live.http, "s").json()["pacellm"]["session"] == "new"
        for answer in answers:
            assert (answer.status_code, answer.json()["durable"]) == (202, False)
            assert str(tmp_path) not in answer.text
        again = live.http.delete("/v1/sessions")
        assert (again.status_code, "durable" in again.json()) == (200, False)
        assert dict(live.engine.faults.counts) == {}
