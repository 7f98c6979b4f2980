"""Servers that are busy, refuse, fail or leave; runs that go on."""

import json
import threading

import httpx
import pytest

from pacellm.errors import ConfigError, PaceError
from pacellm.evaluation import asking
from pacellm.evaluation.arms import KNOWN, Arm, is_pacellm, known_arm, own_arm, served_model
from pacellm.evaluation.asking import Refusal, Run, Server
from pacellm.evaluation.records import Records
from pacellm.evaluation.report import rows, table
from pacellm.evaluation.samples import Prompt, Sample


def server(answer, takes_pacellm=True):
    return Server(httpx.Client(base_url="http://other", transport=httpx.MockTransport(answer)), "m", takes_pacellm)


def said(text="yes", **more):
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return httpx.Response(
        200, json={"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}, **more}
    )


def refused(status=400, code="bad", param=None, **headers):
    error = {"message": f"no: {code}", "type": "t", "code": code, "param": param}
    return httpx.Response(status, json={"error": error}, headers=headers)


def sample(name="0", task="t", **more):
    return Sample(task, 10, name, name, 5, lambda: Prompt(f"q {name}", lambda text: float(text == "yes")), **more)


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(asking.time, "sleep", found.append)
    return found


def ask(answer, arm=KNOWN["off"], **more):
    one = sample(**more)
    return server(answer).ask(Arm("off", fields=arm), one, one.make(), "chat")


def test_busy_servers_are_asked_again_when_they_say(waits):
    answers = [refused(429, "queue_full", **{"Retry-After": "7"}), refused(503, "draining"), said()]
    assert ask(lambda request: answers.pop(0))["text"] == "yes"
    assert waits == [7.0, 7.0]


def test_not_for_ever(waits):
    with pytest.raises(PaceError, match=r"busy \(status 429: no: full\).*run the command again"):
        ask(lambda request: refused(429, "full", **{"Retry-After": "60"}))
    assert sum(waits) == 600


def test_what_fails_thrice_is_told(waits):
    asked = []
    assert ask(lambda request: asked.append(request) or refused(500, "broken")) == Refusal(500, "no: broken", "broken")
    assert len(asked) == 3

    def gone(request):
        raise httpx.ConnectError("gone")

    with pytest.raises(PaceError, match=r"no answer from http://other.*run the command again"):
        ask(gone)
    with pytest.raises(PaceError, match="404: no: model_not_found"):
        ask(lambda request: refused(404, "model_not_found"))
    with pytest.raises(PaceError, match="no completion"):
        ask(lambda request: httpx.Response(200, json={"choices": []}))
    assert ask(lambda request: httpx.Response(400, text="plain")) == Refusal(400, "plain")


def test_bodies():
    bodies = []

    def answer(request):
        bodies.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"choices": [{"text": "yes"}]})

    ask(answer)
    ask(answer, is_raw=True)
    one, other = sample(), server(answer, takes_pacellm=False)
    other.ask(known_arm("off"), one, one.make(), "completions")
    common = {"model": "m", "max_tokens": 5, "temperature": 0}
    assert bodies == [
        (
            "/v1/chat/completions",
            {**common, "messages": [{"role": "user", "content": "q 0"}], "pacellm": {"pa": "off"}},
        ),
        ("/v1/completions", {**common, "prompt": "q 0", "pacellm": {"pa": "off"}}),
        ("/v1/completions", {**common, "prompt": "q 0"}),
    ]
    told = other.ask(known_arm("paper"), one, one.make(), "chat")
    assert isinstance(told, Refusal)
    assert "no PaceLLM server" in told.message
    assert len(bodies) == 3


def run(tmp_path, answer, samples, arms=("off", "paper"), head=None, concurrency=1):
    records = Records(tmp_path / "answers.jsonl", head or {"suite": "s"})
    chosen = [known_arm(name) for name in arms]
    records.check_arms(chosen)
    try:
        Run([(arm, server(answer)) for arm in chosen], records, "chat").ask(samples, concurrency)
    finally:
        records.close()
    return records.of(samples, chosen)


def test_a_run_goes_on_where_it_was_left(tmp_path, waits):
    asked, samples = [], [sample(str(number)) for number in range(3)]

    def leaving(request):
        asked.append(request)
        if len(asked) > 3:
            raise httpx.ConnectError("gone")
        return said()

    with pytest.raises(PaceError, match="gone"):
        run(tmp_path, leaving, samples)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"task": "t", "le')  # it was killed
    asked.clear()
    told = run(tmp_path, lambda request: asked.append(request) or said("no"), samples)
    assert len(asked) == 3
    assert [(one["sample"], one["arm"], one["text"], one["score"]) for one in told] == [
        ("0", "off", "yes", 1.0),
        ("0", "paper", "yes", 1.0),
        ("1", "off", "yes", 1.0),
        ("1", "paper", "no", 0.0),
        ("2", "off", "no", 0.0),
        ("2", "paper", "no", 0.0),
    ]
    run(tmp_path, None, samples)  # nothing is asked
    with pytest.raises(ConfigError, match="another run, with other suite"):
        run(tmp_path, None, samples, head={"suite": "other"})
    with pytest.raises(ConfigError, match="another t than is there now"):
        run(tmp_path, None, [sample(about={"file": "new"})])
    records = Records(tmp_path / "answers.jsonl", {"suite": "s"})
    with pytest.raises(ConfigError, match="another arm off"):
        records.check_arms([Arm("off")])
    records.close()


def test_a_refused_arm_is_told_and_asked_once(tmp_path):
    """And again by the next run, which may find another server."""
    asked = []

    def answer(request):
        is_off = b'"off"' in request.content
        asked.append(is_off)
        return said() if is_off else refused(400, "worse_answers", "pacellm.pa")

    samples = [sample(str(number)) for number in range(4)]
    told = run(tmp_path, answer, samples)
    assert asked == [True, False, True, True, True]
    text = table(rows(told, ["off", "paper"]), "off")
    assert "0 (+4 refused)" in text
    assert "paper: 4 without an answer: no: worse_answers" in text
    told = run(tmp_path, lambda request: said(), samples)
    assert not any("refused" in one for one in told)


def test_a_refused_sample_does_not_refuse_its_arm(tmp_path):
    told = run(
        tmp_path,
        lambda request: refused(400, "context_length_exceeded", "messages") if b"q 1" in request.content else said(),
        [sample(str(number)) for number in range(3)],
    )
    assert ["refused" in one for one in told] == [False, False, True, True, False, False]
    (off, paper) = rows(told, ["off", "paper"])
    assert (off.answered, off.refused, paper.agreement, paper.p) == (2, 1, 1.0, 1.0)


def test_concurrency_is_bounded(tmp_path):
    here, most, both = [0], [0], threading.Event()

    def answer(request):
        here[0] += 1
        most[0] = max(most[0], here[0])
        if here[0] == 2:
            both.set()
        assert both.wait(10)
        here[0] -= 1
        return said()

    told = run(tmp_path, answer, [sample(str(number)) for number in range(8)], arms=("off",), concurrency=2)
    assert len(told) == 8
    assert most[0] == 2


def test_rows_are_paired():
    def record(number, arm, score, text, task="t"):
        return {"task": task, "length": 10, "sample": number, "document": number, "arm": arm, "score": score,
                "text": text}  # fmt: skip

    records = [record(str(n), "off", 0.0, "a") for n in range(6)] + [
        record(str(n), "x", 1.0, "a" if n else "b") for n in range(6)
    ]
    records += [record("0", arm, 1.0, "a", task="u") for arm in ("off", "x")]
    found = {(row.task, row.arm): row for row in rows(records, ["x", "off"])}
    row = found["t", "x"]
    assert (row.score.value, row.difference.value, row.agreement) == (1.0, 1.0, pytest.approx(5 / 6))
    assert row.p == 2 * 2 / 64  # two tasks
    assert found["u", "x"].p == 1.0
    assert found["t", "off"].difference is None
    assert found["all", "x"].difference.value == 0.5
    assert found["all", "off"].score.value == 0.5


def test_arms():
    assert own_arm("vllm=http://a:1/v1/") == Arm("vllm", url="http://a:1")
    assert own_arm('cut={"truncate_prompt_tokens": 9}') == Arm("cut", fields={"truncate_prompt_tokens": 9})
    told = own_arm('b={"base_url": "http://a/v1", "model": "q", "api_key": "k", "top_k": 1}')
    assert told == Arm("b", "http://a", "q", "k", {"top_k": 1})
    for wrong in ("x", "x=", "x=ftp://a", "x=[1]", 'x={"model": "m"}', 'x={"api_key": "k"}', 'x={"messages": []}'):
        with pytest.raises(ConfigError, match="--arm"):
            own_arm(wrong)
    with pytest.raises(ConfigError, match="there is no arm 'fast'; there are off, observe"):
        known_arm("fast")


def test_what_is_served():
    def models(*names):
        return server(lambda request: httpx.Response(200, json={"data": [{"id": name} for name in names]})).http

    assert served_model(models("a", "b"), "b") == "b"
    assert served_model(models("a"), None) == "a"
    with pytest.raises(ConfigError, match="serves a, b; say which with --model"):
        served_model(models("a", "b"), None)
    with pytest.raises(ConfigError, match="serves a; say which"):
        served_model(models("a"), "c")
    with pytest.raises(PaceError, match="does not list its models"):
        served_model(server(lambda request: httpx.Response(500)).http, None)
    assert not is_pacellm(server(lambda request: httpx.Response(200, json={"version": "0.9"})).http)
    assert is_pacellm(server(lambda request: httpx.Response(200, json={"pa": {}})).http)
