"""The command line as a user meets it: in a process of its own."""

import gc
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from pacellm import __version__
from pacellm.cli.main import main
from pacellm.server import listening

PACELLM = (sys.executable, "-P", "-m", "pacellm")


pytestmark = pytest.mark.usefixtures("root_logger")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_demo_shows_what_the_readme_says(tmp_path):
    for name in ("server", "torch", "pacellm", "httpx"):  # files of the user's, which no process of ours may import
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the working directory was imported')")
    command = [*PACELLM, "demo", "--tokens", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("(right)") == 2
    for line in ("time to first token", "prefill", "tokens/s", "bank reads", "effective rank", "Peak memory"):
        assert line in done.stdout
    again, whole = re.search(r"computed again +([\d,]+) of ([\d,]+)", done.stdout).groups()
    assert int(again.replace(",", "")) < 60 < int(whole.replace(",", ""))


def test_serve_answers_and_ends_on_sigterm():
    port = free_port()
    command = [*PACELLM, "serve", "--port", str(port), "--served-model-name", "mine", "--max-model-len", "4K",
               "--kv-cache-memory-bytes", "256M", "--pa-layers", "1,3", "--pa-preset", "paper",
               "--accept-worse-answers"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        log = []
        for line in server.stderr:
            log.append(line)
            if "running on" in line:
                break
        else:
            pytest.fail("".join(log))
        body = {"model": "mine", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            (model,) = client.get("/v1/models").json()["data"]
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(60) in (0, -signal.SIGTERM), rest
    assert (model["id"], model["max_model_len"]) == ("mine", 4096)
    assert "preset paper in layers 1,3" in "".join(log)
    assert "accepted (--accept-worse-answers)" in "".join(log)
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/such/model"], "no/such/model does not exist"),
        (["--pa-layers", "99"], "99"),
        (["--pa-bank-size", "0"], "bank_size"),
        (["--max-model-len", "1000000"], "max_model_len"),
        (["--max-num-batched-tokens", "0"], "max_num_batched_tokens"),
        (["--kv-cache-memory-bytes", "1K"], "kv_cache_memory"),
        (["--device", "cuda:99"], "'cuda:99' is not here; use one of cpu"),
        (["--otlp-endpoint", "collector:4318"], "write it as http://host:4318"),
        (["--device", "typewriter"], "'typewriter' is not here"),
        (["--device", "cpu", "--attention-kernel", "cudnn"], "cudnn is for a GPU"),
        (["--deterministic", "--attention-kernel", "flash-attn-3"], "auto or flash with deterministic"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--kv-cache-memory-bytes", "900T"], "leave it out to take what is free"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["serve", "--port", "0", *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert says in printed.splitlines()[-1]
    assert "Traceback" not in printed


@pytest.mark.parametrize("flag", ["--port", "--admin-port"])
def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(flag, capsys, monkeypatch):
    monkeypatch.setattr("pacellm.cli.serve.build", lambda options: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", "0", flag, str(port)]) == 2
    assert capsys.readouterr().err == (f"pacellm: cannot listen on 127.0.0.1, port {port}: Address already in use; "
                                       f"choose another {flag} or --host\n")  # fmt: skip


def test_a_name_with_several_addresses_is_bound_on_those_that_there_are(monkeypatch):
    found = [
        (socket.AF_INET, 1, 6, "", ("192.0.2.1", 0)),  # of nobody
        (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, 1, 6, "", ("127.0.0.2", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listening.bound("name", 0) as sockets:
        assert [one.getsockname()[0] for one in sockets] == ["127.0.0.1", "127.0.0.2"]
        assert len({one.getsockname()[1] for one in sockets}) == 1
    assert all(one.fileno() == -1 for one in sockets)


def test_a_family_that_is_not_served_is_said_before_its_tokenizer_is_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    assert main(["serve", "--port", "0", str(tmp_path)]) == 2
    assert "model type 'mamba2' is not served" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--port", "99999"], "argument --port: '99999' is not a port"),
        (["serve", "--admin-port", "-1"], "argument --admin-port: "),
        (["demo", "--tokens", "0"], "argument --tokens: '0' is too short"),
        (["demo", "--tokens", "0", "--model", "smollm2"], "argument --tokens: '0' is too short"),
        (["sing"], "invalid choice: 'sing'"),
        (["serve", "--prot", "1"], "pacellm serve: --prot is unknown; did you mean --port? (`pacellm serve --help`"),
        (["demo", "--zebra=1"], "pacellm demo: --zebra=1 is unknown ("),
        (["sessions", "rm"], "the following arguments are required: NAME"),
    ],
)
def test_flags_that_cannot_work_are_said_in_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr().err
    assert (end.value.code, printed.count("\n")) == (2, 1)
    assert says in printed


def test_traces_without_their_package_name_the_extra(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "pacellm.server.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert main(["serve", "--port", "0", "--otlp-endpoint", "http://127.0.0.1:4318"]) == 2
    assert "pip install 'pacellm[otel]'" in capsys.readouterr().err.splitlines()[-1]


def test_unreadable_values_name_the_flag(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--max-model-len", "long"])
    assert "--max-model-len" in capsys.readouterr().err


def test_a_server_does_not_look_for_garbage_in_what_it_begins_with(monkeypatch):
    looked_at = []
    monkeypatch.setattr("pacellm.cli.serve.build", lambda options: (None, ["key"], None))
    monkeypatch.setattr("pacellm.server.launcher.run", lambda *_, **__: looked_at.append(len(gc.get_objects())))
    before = [[] for _ in range(10_000)]
    assert main(["serve", "--port", "0"]) == 0
    assert looked_at[0] < len(before)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["chat", "--help"]])
def test_help_and_version_are_there_at_once(arguments):
    code = f"""import atexit, sys
from pacellm.cli.main import main
atexit.register(lambda: print(sorted({{"torch", "transformers", "pydantic", "httpx", "asyncio"}} & {{*sys.modules}})))
main({arguments})"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, "[]"), found.stdout


def test_a_reader_that_goes_is_no_error():
    with subprocess.Popen([*PACELLM, "completion", "bash"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        done.stdout.close()
        assert (done.stderr.read(), done.wait(60)) == (b"", 1)


def test_the_package_is_a_command():
    found = subprocess.run([*PACELLM, "--version"], capture_output=True, text=True, timeout=60)
    assert found.stdout == f"pacellm {__version__}\n", found.stderr
