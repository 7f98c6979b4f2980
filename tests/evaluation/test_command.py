"""``pacellm eval`` against the bundled model's live server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from pacellm.cli.main import main
from tests.server.conftest import NAME, start

NEEDLE = ("--needle", "The access code of the amber archive is {number}.", "--question",
          "What is the access code of the amber archive?", "--key-words", "{number}")  # fmt: skip


@pytest.fixture(scope="module")
def live():
    with start() as server:
        yield server


@pytest.fixture
def evaluate(live, tmp_path, monkeypatch, capsys):
    """Runs the command; its status, what it printed, and the file's answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(*arguments):
        status = main(["eval", "--base-url", f"{live.url}/v1", *arguments])
        told = capsys.readouterr()
        files = list(tmp_path.glob("*.jsonl"))
        answers = [json.loads(line) for path in files for line in path.read_text().splitlines()[1:]]
        return status, told.out + told.err, answers

    return run


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(3):
        text = f"Chapter {number}. " + "The road to the mill was long. The miller slept. " * 40
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    return ("--texts", str(tmp_path / "texts"))


def test_niah(evaluate, texts, tmp_path):
    grid = ("niah", "--lengths", "256,512", "--samples", "2", "--depths", "0,60", *texts, *NEEDLE, "--plot", "grid.png")
    status, told, answers = evaluate(*grid, "--arms", "off,observe,working-memory", "--concurrency", "2")
    assert status == 1  # an arm has no answers
    assert "working-memory: 8 without an answer: this server has no working memory" in told
    assert "lengths were counted by http://127.0.0.1" in told
    assert f"answers: eval-niah-{NAME}.jsonl" in told
    given = [one for one in answers if "refused" not in one]
    assert len(given) == 16
    assert all(one["prompt_tokens"] <= one["length"] - 64 for one in given)
    assert sum(one["score"] for one in given) > 8
    by_arm = {(one["sample"], one["length"], one["arm"]): one["text"] for one in given}
    assert all(by_arm[sample, length, "observe"] == text for (sample, length, _), text in by_arm.items())
    assert (tmp_path / "grid.png").stat().st_size > 5000

    status, told, more = evaluate(*grid, "--arms", "off,observe")
    assert status == 0
    assert "has 16 of 16 answers" in told
    assert len(more) == len(answers)


def test_infinitebench_beside_another_server(evaluate, live):
    status, _, answers = evaluate(
        "infinitebench", "--lengths", "512", "--samples", "2", "--tasks", "passkey", "--arm", f"beside={live.url}",
        "--arm", 'cut={"truncate_prompt_tokens": 64}', "--max-tokens", "12",
    )  # fmt: skip
    assert status == 0
    assert {(one["arm"], json.dumps(one["fields"])) for one in answers} == {
        ("off", '{"pacellm": {"pa": "off"}}'),
        ("beside", "{}"),
        ("cut", '{"truncate_prompt_tokens": 64}'),
    }
    assert [one["prompt_tokens"] for one in answers if one["arm"] == "cut"] == [64, 64]


def test_ruler_and_longbench(evaluate, tmp_path):
    question = "The access code of the amber archive is 48213.\n\nWhat is the access code of the amber archive?"
    task = tmp_path / "data" / "niah_single_1"
    task.mkdir(parents=True)
    line = {"index": 0, "input": question, "outputs": ["48213"], "length": 30}
    (task / "validation.jsonl").write_text(json.dumps(line) + "\n")
    status, told, _ = evaluate("ruler", "--data", "data", "--max-tokens", "12", "--out", "ruler.jsonl")
    assert status == 0
    assert "for RULER's evaluate.py: ruler.pred/ARM" in told
    predicted = json.loads((tmp_path / "ruler.pred/off/niah_single_1.jsonl").read_text())
    assert "48213" in predicted["pred"]

    line = {"input": "What is the access code of the amber archive?", "context": question, "answers": ["48213"],
            "all_classes": None, "_id": "1"}  # fmt: skip
    for name in ("qasper", "lcc"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    status, told, answers = evaluate("longbench", "--data", "data", "--lengths", "1K", "--max-tokens", "12")
    assert status == 0
    assert {one["task"] for one in answers} == {"niah_single_1", "qasper", "lcc"}


class Other(BaseHTTPRequestHandler):
    """A server of another kind: no /version, no /tokenize, no pacellm. ``keys`` are those that it was sent."""

    keys: ClassVar[set[str | None]] = set()

    def do_GET(self):
        self.keys.add(self.headers["Authorization"])
        self._say({"data": [{"id": "other"}]} if self.path == "/v1/models" else None)

    def do_POST(self):
        self.keys.add(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = self.path == "/v1/chat/completions"
        assert not is_chat or "pacellm" not in body
        self._say({"choices": [{"message": {"content": "It is 12345."}}]} if is_chat else None)

    def _say(self, answer):
        told = json.dumps(answer).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_):
        pass


@pytest.fixture
def other():
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_another_server_alone(evaluate, other, tmp_path):
    few = ("infinitebench", "--lengths", "1K", "--samples", "2", "--tasks", "passkey", "--plot", "bars.png")
    status, told, answers = evaluate(*few, "--arms", "off,observe", "--base-url", other)
    assert status == 1
    assert f"observe: 2 without an answer: {other} is no PaceLLM server" in told
    assert "lengths are about 4 characters a token" in told
    assert [one["text"] for one in answers if one["arm"] == "off"] == ["It is 12345."] * 2
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_a_key_is_for_one_server(evaluate, other, live):
    Other.keys.clear()
    few = ("infinitebench", "--lengths", "512", "--samples", "1", "--tasks", "passkey", "--max-tokens", "2")
    assert evaluate(*few, "--api-key", "secret", "--arm", f"beside={other}")[0] == 0
    assert Other.keys == {None}
    Other.keys.clear()
    evaluate(*few, "--out", "b.jsonl", "--arm", f"keyed={json.dumps({'base_url': other, 'api_key': 'own'})}")
    assert Other.keys == {"Bearer own"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("infinitebench", "--model", "x"), "serves pacellm-demo; say which with --model"),
        (("ruler",), "ruler needs --data FOLDER"),
        (("niah", "--data", "x"), "--data is for ruler, longbench, not for niah"),
        (("niah", "--needle", "x"), "--needle, --question and --key-words go together"),
        (("niah", "--texts", "nowhere"), "nowhere has no texts"),
        (("infinitebench", "--arms", "fast"), "there is no arm 'fast'"),
        (("infinitebench", "--arms", "off,off"), "two arms have one name"),
        (("infinitebench", "--lengths", "16"), "16 tokens are too few for passkey"),
        (("infinitebench", "--arm", "gone=http://127.0.0.1:9"), "does not list its models"),
    ],
)
def test_refused(evaluate, capsys, arguments, message):
    status, told, _ = evaluate(*arguments)
    assert status == 2
    assert message in told


@pytest.mark.parametrize(("flag", "value"), [("--lengths", "4K,x"), ("--depths", "0,101"), ("--arms", "off,,paper")])
def test_bad_flags(flag, value):
    with pytest.raises(SystemExit):
        main(["eval", "niah", flag, value])
