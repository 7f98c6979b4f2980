"""The command line as a user meets it: in a process of its own."""

import gc
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from pacellm.cli.main import main

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
    ],
)
def test_what_cannot_work_is_said_in_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["serve", *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert says in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_traces_without_their_package_name_the_extra(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "pacellm.server.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert main(["serve", "--otlp-endpoint", "http://127.0.0.1:4318"]) == 2
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
    assert main(["serve"]) == 0
    assert looked_at[0] < len(before)


def test_help_is_there_at_once():
    code = "import sys, pacellm.cli.main as cli; cli.new_parser(); print({'torch', 'pydantic'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "set()", found.stderr
