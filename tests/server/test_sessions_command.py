"""``pacellm sessions`` against a live server."""

import json

import httpx
import pytest

from pacellm.cli.main import main
from pacellm.cli.sessions import listed
from pacellm.server.auth import Keys
from tests.server.conftest import start


@pytest.fixture(scope="module")
def keyed():
    with start(keys=Keys({"key-one": "one", "key-two": "two"})) as server:
        yield server


def ask(server, session, key):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "session_id": session}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text


def run(server, capsys, *arguments, key="key-one"):
    status = main(["sessions", *arguments, "--url", f"{server.url}/v1", "--api-key", key])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_ls_show_and_rm(keyed, capsys):
    for name in ("a:first", "second"):
        ask(keyed, name, "key-one")
    ask(keyed, "another", "key-two")
    status, out, _ = run(keyed, capsys, "ls")
    head, *rows = out.splitlines()
    assert (status, head.split()) == (0, ["SESSION", "TOKENS", "TIER", "BYTES", "USED"])
    assert [row.split()[0] for row in rows] == ["second", "a:first"]
    assert all("device" in row and row.endswith(("s ago", "now")) for row in rows)
    status, out, _ = run(keyed, capsys, "show", "a:first")
    assert (status, json.loads(out)["id"]) == (0, "a:first")
    assert run(keyed, capsys, "rm", "a:first", "second") == (0, "a:first: deleted\nsecond: deleted\n", "")
    status, out, err = run(keyed, capsys, "rm", "second")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "second" in err
    assert run(keyed, capsys, "ls")[1].split() == head.split()


def test_a_list_of_several_pages():
    names = ["a", "b:1", "c", "d", "e"]

    def answer(request):
        after = request.url.params.get("after")
        page = names[names.index(after) + 1 if after else 0 :][:2]
        data = [{"id": name} for name in page]
        return httpx.Response(200, json={"data": data, "last_id": page[-1], "has_more": page[-1] != names[-1]})

    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as http:
        assert [one["id"] for one in listed(http)] == names


@pytest.mark.parametrize(("key", "says"), [("", "wants an API key"), ("other", "does not know this API key")])
def test_a_key_that_is_wrong_is_said(keyed, capsys, key, says, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    status, out, err = run(keyed, capsys, "ls", key=key)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_the_key_of_the_environment(keyed, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key-one")
    assert main(["sessions", "ls", "--url", keyed.url]) == 0
