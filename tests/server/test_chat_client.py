"""``pacellm chat`` against a live server."""

import io
import signal
import subprocess
import sys
import time

import httpx
import pytest

from pacellm.cli.chat import Conversation, Terminal
from pacellm.cli.main import main
from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.conftest import start


@pytest.fixture(scope="module")
def document():
    return make_document(num_tokens=1200, num_facts=6, seed=3, tokenizer=ChatTokenizer(MODEL_PATH)._tokenizer)


class Screen(io.StringIO):
    """A terminal's side: what was written to it."""

    def isatty(self):
        return True


def run(live, lines, session, **changes):
    screen = io.StringIO()
    conversation = Conversation(live.http, session, **changes)
    status = Terminal(conversation, io.StringIO("\n".join(lines) + "\n"), screen).run()
    return status, screen.getvalue()


def test_two_questions_a_reset_and_the_end(live, document):
    first, second = document.facts[1], document.facts[4]
    live.http.delete("/v1/sessions")
    lines = ["", first.question, second.question, "/what", "/reset", first.question, "/quit", "never asked"]
    status, shown = run(live, lines, "client", document=document.text)
    assert status == 0
    assert shown.count("session new") == 2
    assert "session resident" in shown
    assert "/what is unknown" in shown
    assert "(begun again)" in shown
    assert first.answer in shown
    assert second.answer in shown
    assert "never" not in shown
    # another run of the same name goes on
    assert "session resident" in run(live, [second.question], "client")[1]


def test_refusals_are_shown_and_the_client_goes_on(live):
    status, shown = run(live, ["hello"], "client-2", model="gpt-9")
    assert (status, "'gpt-9' is not served" in shown) == (1, True)
    closed = Conversation(httpx.Client(base_url="http://127.0.0.1:9"), "x")
    screen = io.StringIO()
    assert Terminal(closed, io.StringIO("hello\n/reset\n"), screen).run() == 1
    assert screen.getvalue().count("no answer from the server") == 2


def test_a_terminal_sees_progress_on_one_line(live, document, monkeypatch):
    screen, lines = Screen(), iter([document.facts[0].question])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    live.http.delete("/v1/sessions")
    Terminal(Conversation(live.http, "seen", document=document.text), Screen(), screen).run()
    shown = screen.getvalue()
    assert "\r\x1b[K  reading [" in shown
    assert shown.rindex("reading") < shown.index(document.facts[0].answer)


def test_ctrl_c_cancels_the_answer_and_keeps_the_session(live):
    command = [sys.executable, "-m", "pacellm.cli", "chat", "--url", f"{live.url}/v1", "--session", "ctrl-c"]
    live.http.delete("/v1/sessions")
    # where the tests themselves run in a shell's background, Ctrl-C is ignored, and children would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with client:
        client.stdin.write("hello\n")
        client.stdin.flush()
        shown = [client.stdout.readline() for _ in range(3)]
        assert "session new" in shown[2]
        client.stdin.write("the river and the hills " * 8000 + "\n")
        client.stdin.flush()
        while not live.engine.has_work:
            time.sleep(0.01)
        client.send_signal(signal.SIGINT)
        assert client.stdout.readline() == "\n"
        assert "cancelled" in client.stdout.readline()
        live.wait_until_idle()
        assert live.http.get("/v1/sessions/ctrl-c").json()["commits"] == 1
        client.stdin.write("hello\n/quit\n")
        client.stdin.flush()
        rest = client.stdout.read()
        assert client.wait(30) == 0
    assert "session resident" in rest


def test_a_conversation_goes_on_after_a_restart(tmp_path, document):
    config = EngineConfig(kv_cache_memory=2**28, max_model_len=2**14, session_dir=tmp_path)
    first, second = document.facts[1], document.facts[4]
    with start(config) as server:
        assert "session new" in run(server, [first.question], "kept", document=document.text)[1]
    with start(config) as server:
        status, shown = run(server, [second.question], "kept")
        assert (status, "session restored" in shown, second.answer in shown) == (0, True, True)
        assert len(server.sessions()) == 1  # nothing else is left behind


def test_a_session_that_goes_while_one_talks(live):
    live.http.delete("/v1/sessions")
    conversation = Conversation(live.http, "gone")

    def talk(*lines):
        screen = io.StringIO()
        assert Terminal(conversation, io.StringIO("\n".join(lines) + "\n"), screen).run() == 0
        return screen.getvalue()

    assert "session new" in talk("hello")
    live.http.delete("/v1/sessions/gone")
    shown = talk("hello", "/reset", "hello", "hello")
    assert shown.index("no session 'gone'") < shown.index("session new") < shown.index("session resident")


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    assert main(["chat", "--file", str(tmp_path / "absent")]) == 2
    assert "cannot read" in capsys.readouterr().err
