"""What clients send on a second turn, recorded by ``load_tests/compat/first_turns.py`` (of aider, Cline and Open WebUI
written as their source has it), is answered by any kind of model."""

import json
from pathlib import Path

import pytest

from pacellm.server.response_store import Transcript
from tests.server.conftest import NAME, start
from tests.server.talk import HERMES, WEATHER

RECORDED = Path(__file__).parents[1] / "data" / "history"
TURNS = [
    pytest.param(turn, id=f"{path.stem}-{turn['api']}-{turn['kind']}-{number}")
    for path in sorted(RECORDED.glob("*.json"))
    for number, turn in enumerate(json.loads(path.read_text(encoding="utf-8")))
]
KINDS = {"text", "reasoning", "call", "parallel", "cut", "no-arguments", "refusal", "structured"}


@pytest.fixture(scope="module")
def hermes():
    """A model whose template has tools and reasoning."""
    with start(files={"chat_template": HERMES}) as server:
        yield server


def stored(server):
    """The response that references are to, as the stand-in for the server gave it."""
    items = [
        {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Be kind."}]},
        {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        *({"id": f"fc_{n}", "type": "function_call", "call_id": f"call_{n}", "name": "get_weather", "arguments": "{}"}
          for n in range(2)),
    ]  # fmt: skip
    ids = [item["id"] for item in items]
    transcript = Transcript((), None, "x")
    server.service.response_store.put(("default", "resp_1"), transcript, json.dumps({"output": items}).encode(), ids)


@pytest.mark.parametrize("turn", TURNS)
def test_second_turns_are_answered(live, hermes, turn):
    for server in (live, hermes):
        function = WEATHER["function"]
        if turn["api"] == "chat":
            body = {"messages": turn["said"], "tools": [WEATHER], "max_tokens": 1}
            answer = server.http.post("/v1/chat/completions", json={"model": NAME, **body})
        else:
            stored(server)
            body = {"input": turn["said"], "tools": [{"type": "function", **function}], "max_output_tokens": 1}
            answer = server.http.post("/v1/responses", json={"model": NAME, "store": False, **body})
        assert answer.status_code == 200, answer.text


def test_every_kind_is_recorded():
    """A client that raises on a kind has nothing of it to send."""
    for path in RECORDED.glob("*.json"):
        kinds = {turn["kind"] for turn in json.loads(path.read_text(encoding="utf-8"))}
        assert kinds >= KINDS - {"refusal", "cut"}, path.name
