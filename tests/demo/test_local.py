"""The server that a demo starts."""

import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

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
