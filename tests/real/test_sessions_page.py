"""The example of docs/sessions.md on a real model."""

from pacellm.config import EngineConfig
from tests.server.conftest import start
from tests.server.page import run_example


def test_the_example_on_smollm2(smollm2, monkeypatch):
    monkeypatch.setattr("tests.server.conftest.MODEL_PATH", smollm2)
    with start(EngineConfig(kv_cache_memory=2**28, max_model_len=4096)) as live:
        answers, follow_up = run_example(live.url)
        assert answers == {
            "code": "The access code of the amber archive is 48213.",
            "museum": "The opening day of the harbor museum is Friday.",
            "academy": "The home city of the cedar academy is Tunis.",
        }
        assert follow_up == answers["academy"]
        live.http.delete("/v1/sessions")
        without, _ = run_example(live.url, append=False)
        assert not any(fact in answer for fact in ("48213", "Friday", "Tunis") for answer in without.values())
