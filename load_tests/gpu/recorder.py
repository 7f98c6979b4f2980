"""A pytest plugin: each test's outcome as a JSON line, as soon as it is known. ``-p load_tests.gpu.recorder``; the file
is named by the environment variable ``RESULTS``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from load_tests.gpu.results import Results


def pytest_runtest_logreport(report: Any) -> None:
    """A test was called, or what it needs failed or was not there."""
    path = os.environ.get("RESULTS")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    why = str(report.longrepr)[-2000:] if report.failed or report.skipped else None
    Results(Path(path), "tests").add(report.nodeid, outcome=report.outcome, seconds=report.duration, why=why)
