"""Programs that deploy/ is checked with and that tests can do without."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(name, package=None):
    """Where it is. Without it the test is skipped, which is told at the end, and fails under `make check-deploy`."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        reason = f"{name} is not installed" + (f": Debian's package {package}" if package else "; see docs/deploy.md")
        (pytest.fail if os.environ.get("PACELLM_CHECK_DEPLOY") else pytest.skip)(reason)
    return found
