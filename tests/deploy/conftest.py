"""The live server of the HTTP tests, and Prometheus' checker."""

import subprocess

import pytest

from tests.deploy.tools import tool
from tests.server.conftest import live

__all__ = ["live"]


@pytest.fixture(scope="session")
def promtool():
    """Runs it in a folder, with a text as its input; it must find nothing wrong."""
    program = tool("promtool", "prometheus")

    def run(folder, *command, text=None):
        done = subprocess.run([program, *command], cwd=folder, input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    return run
