"""With --log-format json all that a server writes is JSON, from its start to its end, under our names."""

import json
import logging
import signal
import subprocess
import sys
import time

import httpx

from pacellm.server import logs
from tests.cli.test_commands import free_port

FOREIGN = """
import logging, sys, threading, warnings
from pacellm.server import logs
logs.configure("info", "json")
import transformers, tqdm
logs.adopt()
print("printed 100 %s")
sys.stderr.write("no end yet")
sys.stderr.flush()
for _ in tqdm.tqdm(range(3), disable=False): pass
warnings.warn("a warning\\nin two lines")
transformers.logging.get_logger("transformers.models").warning("of a model")
logging.getLogger("asyncio").error("of the loop")
logging.getLogger("uvicorn.error").info("started")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise ValueError("the end")
"""


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_what_others_write_is_json_too():
    done = subprocess.run([sys.executable, "-c", FOREIGN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    lines = lines_of(done.stderr)
    found = {(line["logger"], line["level"], line.get("library"), line["message"]) for line in lines}
    assert ("pacellm.stdout", "info", None, "printed 100 %s") in found
    assert ("pacellm.stderr", "warning", None, "no end yet") in found
    assert ("pacellm.model", "warning", "transformers.models", "of a model") in found
    assert ("pacellm.server", "error", "asyncio", "of the loop") in found
    assert ("pacellm.server", "info", "uvicorn.error", "started") in found
    assert any(line["logger"] == "pacellm.warnings" and "a warning\nin two lines" in line["message"] for line in lines)
    assert any(line["logger"] == "pacellm.stderr" and "3/3" in line["message"] for line in lines)
    caught = [line["exception"].splitlines()[-1] for line in lines if line["level"] == "critical"]
    assert caught == ["ZeroDivisionError: division by zero", "ValueError: the end"]


def serve(*flags):
    command = [sys.executable, "-m", "pacellm.cli", "serve", "--log-format", "json", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_server_from_start_to_ctrl_c():
    port = free_port()
    process = serve("--port", str(port), "--kv-cache-memory-bytes", "64M", "--max-model-len", "4096")
    try:
        until = time.monotonic() + 120
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while time.monotonic() < until:
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            for path in ("/health", "/metrics", "/v1/models", "/nothing"):
                client.get(path)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (0, 130)  # 0 where whoever runs the tests has told its children to ignore the signal
    assert out == ""
    lines = lines_of(err)
    assert all(line["logger"].partition(".")[0] == "pacellm" for line in lines)
    assert [line["route"] for line in lines if line["logger"] == "pacellm.access"] == ["/v1/models", "/nothing"]
    assert not any("unknown" in line["message"] for line in lines)


def test_why_a_server_does_not_start_is_json():
    process = serve("--api-key-file", "/absent")
    out, err = process.communicate(timeout=60)
    (line,) = lines_of(err)
    assert (process.returncode, out, line["level"], line["logger"]) == (2, "", "critical", "pacellm")


def test_lines_of_text_have_our_names_too():
    record = logging.LogRecord("httpx", logging.INFO, "", 0, "GET", None, None)
    assert logs.with_our_name(record)
    assert (record.name, record.fields) == ("pacellm.libraries", {"library": "httpx"})
    own = logging.LogRecord("pacellm.engine", logging.INFO, "", 0, "step", None, None)
    assert logs.with_our_name(own)
    assert own.name == "pacellm.engine"


READER_GONE = """
import logging, os
from pacellm.server import logs
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
logs.configure("info", "json")
logging.getLogger("pacellm").info("nobody reads this")
os.write(1, b"goes on")
os._exit(0)
"""


def test_a_reader_that_has_gone_stops_nothing():
    done = subprocess.run([sys.executable, "-c", READER_GONE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "goes on"
