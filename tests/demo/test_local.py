"""The server that a demo starts."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from urllib.parse import urlsplit

import httpx
import pytest

from pacellm.demo import local
from pacellm.errors import PaceError

SCRIPT = """
import time
from pacellm.demo.local import running_server

with running_server() as client:
    print(client.base_url, flush=True)
    time.sleep(60)
"""


def test_it_ends_with_a_demo_that_is_terminated():
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as demo:
        place = urlsplit(demo.stdout.readline().strip())
        with socket.create_connection((place.hostname, place.port), timeout=10):
            pass
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(30) == 128 + signal.SIGTERM
    with socket.socket() as again:
        again.settimeout(10)
        assert again.connect_ex((place.hostname, place.port)) != 0


@pytest.mark.parametrize(
    ("script", "least", "most"),
    [
        ("import time\nfor _ in range(15): print('loading', flush=True); time.sleep(0.2)", 2.5, 20),  # slow, not stuck
        ("import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass", 2.5, 20),
        ("import time; time.sleep(60)", 0, 20),
    ],
)
def test_a_server_that_starts_has_as_long_as_something_goes_on(script, least, most, monkeypatch):
    monkeypatch.setattr(local, "_STILL_SECONDS", 1.5)
    started = time.monotonic()
    with (
        tempfile.TemporaryFile() as log,
        httpx.Client(base_url="http://127.0.0.1:9") as client,
        subprocess.Popen([sys.executable, "-c", script], stdout=log) as server,
    ):
        with pytest.raises(PaceError, match="the server did not start"):
            local._wait_until_ready(client, server, log)
        assert least < time.monotonic() - started < most
        server.kill()
