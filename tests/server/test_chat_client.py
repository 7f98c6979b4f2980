"""``pacellm chat`` against a live server."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import httpx
import pytest

from pacellm.cli.chat import Conversation
from pacellm.cli.lines import completions
from pacellm.cli.main import main
from pacellm.cli.terminal import Terminal, _reading
from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.conftest import start


@pytest.fixture(scope="module")
def document():
    return make_document(num_tokens=1200, num_facts=6, seed=3, tokenizer=ChatTokenizer(MODEL_PATH)._tokenizer)


def run(live, lines, session, **changes):
    screen = io.StringIO()
    conversation = Conversation(live.http, session, **changes)
    status = Terminal(conversation, live.http, io.StringIO("\n".join(lines) + "\n"), screen).run()
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
    http = httpx.Client(base_url="http://127.0.0.1:9")
    screen = io.StringIO()
    assert Terminal(Conversation(http, "x"), http, io.StringIO("hello\n/reset\n"), screen).run() == 1
    assert screen.getvalue().count("no answer from the server") == 2


def test_a_terminal_sees_progress_on_one_line(live, document, monkeypatch):
    screen, lines = io.StringIO(), iter([document.facts[0].question])

    def ask():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    live.http.delete("/v1/sessions")
    monkeypatch.setenv("COLUMNS", "80")
    Terminal(Conversation(live.http, "seen", document=document.text), live.http, target=screen, ask=ask).run()
    shown = screen.getvalue()
    assert "\r\x1b[K  reading [" in shown
    assert shown.rindex("reading") < shown.index(document.facts[0].answer)


@pytest.mark.parametrize("columns", [1, 20, 40, 60, 80, 200])
def test_progress_fits_the_terminal(columns):
    line = _reading({"processed": 70_000, "total": 200_000, "estimated_ms": 12_000}, columns)
    assert len(line) < max(2, columns)
    assert columns < 60 or line.count("█") > 2


def test_ctrl_c_cancels_the_answer_and_keeps_the_session(live):
    command = [sys.executable, "-m", "pacellm.cli", "chat", "--url", f"{live.url}/v1", "--session", "ctrl-c"]
    live.http.delete("/v1/sessions")
    # where the tests themselves run in a shell's background, Ctrl-C is ignored, and children would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True)  # fmt: skip
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
        assert Terminal(conversation, live.http, io.StringIO("\n".join(lines) + "\n"), screen).run() == 0
        return screen.getvalue()

    assert "session new" in talk("hello")
    live.http.delete("/v1/sessions/gone")
    shown = talk("hello", "/reset", "hello", "hello")
    assert shown.index("no session 'gone'") < shown.index("session new") < shown.index("session resident")


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    assert main(["chat", "--file", str(tmp_path / "absent")]) == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "picture").write_bytes(b"\x89PNG")
    assert main(["chat", "--file", str(tmp_path / "picture")]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    (tmp_path / "paper").write_bytes(b"%PDF-1.7 and more")
    assert main(["chat", "--file", str(tmp_path / "paper")]) == 2
    assert "paper is a PDF; give its text" in capsys.readouterr().err


def test_commands_of_the_terminal(live, document, tmp_path):
    live.http.delete("/v1/sessions")
    (tmp_path / "a document.txt").write_text(document.text)
    fact = document.facts[2]
    lines = ["/help", "/file", f"/file {tmp_path / 'a document.txt'}", fact.question, "/sessions"]
    status, shown = run(live, lines, "commands")
    assert "/sessions  lists" in shown
    assert "/file needs a path" in shown
    assert f"({len(document.text):,} characters go in front of the next question)" in shown
    assert fact.answer in shown
    assert "\ncommands  " in shown  # in the list
    assert status == 0


def test_a_server_that_is_not_there_is_named(capsys):
    for arguments, says in (
        (["chat", "--url", "http://127.0.0.1:9"], "start one with `pacellm serve`"),
        (["sessions", "ls", "--url", "http://127.0.0.1:9"], "start one with `pacellm serve`"),
        (["chat", "--url", "127.0.0.1:9"], "write it as http://127.0.0.1:8000"),
        (["chat", "--url", "http://[::1"], "is no URL"),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert says in printed
        assert printed.count("\n") == 1


def test_answers_alone_go_down_a_pipe(live, document, tmp_path):
    live.http.delete("/v1/sessions")
    (tmp_path / "document").write_text(document.text)
    command = [sys.executable, "-m", "pacellm", "chat", "--url", live.url, "--file", str(tmp_path / "document")]
    fact = document.facts[3]
    done = subprocess.run(command, input=f"{fact.question}\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert fact.answer in done.stdout
    assert "session new" in done.stderr


def test_lines_are_edited_and_remembered_in_a_terminal(live, tmp_path):
    """By the keys of a user: an arrow up brings the question of the run before back, TAB completes a command."""
    live.http.delete("/v1/sessions")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "pacellm", "chat", "--url", live.url]

    def typed(keys):
        main, side = pty.openpty()
        client = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
        os.close(side)
        try:
            shown = Shown(main)
            for wait, text in keys:
                shown.until(wait)
                os.write(main, text.encode())
            shown.until(None)
            assert client.wait(30) == 0
        finally:
            client.kill()
            client.wait()
            os.close(main)
        return shown.text

    assert "session new" in typed([("> ", "helo\x1b[Dl\r"), ("prompt tokens in place", ""), ("> ", "\x04")])
    assert (tmp_path / "pacellm" / "chat_history").read_text() == "hello\n"
    shown = typed([("> ", "/he\t\r"), ("begins the conversation", ""), ("> ", "\x1b[A\x1b[A\r"),
                   ("prompt tokens in place", ""), ("> ", "\x04")])  # fmt: skip
    assert "/sessions  lists" in shown


def test_tab_completes_commands_and_paths(tmp_path):
    (tmp_path / "a b.txt").write_text("")
    (tmp_path / "a c").mkdir()
    commands = ("/file", "/help")
    assert completions("/", commands) == ["/file", "/help"]
    assert completions("/he", commands) == ["/help"]
    assert completions(f"/file {tmp_path}/a", commands) == [f"/file {tmp_path}/a b.txt", f"/file {tmp_path}/a c/"]
    assert completions("", commands) == completions("why ", commands) == []


class Shown:
    """What a terminal's other side has written."""

    def __init__(self, descriptor):
        self.text, self._descriptor, self._seen = "", descriptor, 0

    def until(self, text):
        """Read until ``text`` comes that was not waited for before; None waits for the end."""
        deadline = time.monotonic() + 30
        while text is None or text not in self.text[self._seen :]:
            assert time.monotonic() < deadline, self.text
            if not select.select([self._descriptor], [], [], 1)[0]:
                continue
            try:
                piece = os.read(self._descriptor, 65536)
            except OSError:  # the other side is closed
                piece = b""
            if not piece:
                assert text is None, self.text
                return
            self.text += piece.decode(errors="replace")
        self._seen = self.text.index(text, self._seen) + len(text)
