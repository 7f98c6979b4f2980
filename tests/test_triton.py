"""Triton kernels on a CPU. Triton looks at TRITON_INTERPRET when it is first imported, so they get a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_kernels_through_the_interpreter():
    if sys.platform != "linux":
        pytest.skip("Triton is there for Linux only")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py"]
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
