"""The wheel: what is in it, and that it runs where no checkout is."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    source = folder / "source"  # building writes beside the source
    subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(source)], check=True)
    subprocess.run([*command[:-1], str(source)], check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Variables under which the wheel is what is imported."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    return os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def test_all_that_packages_hold_is_in_it(wheel):
    listed = subprocess.run(
        ["git", "ls-files", "pacellm", "server"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    held = set(zipfile.ZipFile(wheel).namelist())
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_symlink():
            continue
        inside = f"pacellm/{name}" if name.startswith("server/") else name
        assert inside in held, inside


def test_its_metadata(wheel):
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as packed:
        name = next(one for one in packed.namelist() if one.endswith(".dist-info/METADATA"))
        told = packed.read(name).decode()
    for line in (f"Version: {about['version']}", "License-Expression: Apache-2.0", *about["classifiers"], "# PaceLLM"):
        assert line in told


def test_it_is_imported_from_there(installed, tmp_path):
    code = "import pacellm, pacellm.server.app; print(pacellm.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=installed, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(installed["PYTHONPATH"])


@pytest.mark.slow
def test_the_demo_runs_from_any_folder(installed, tmp_path):
    code = "import sys; from pacellm.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--tokens", "2000"],
        cwd=tmp_path, env=installed, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
