"""Prints the versions, in this environment, of everything that the server needs: docker/constraints.txt.

    .venv/bin/python docker/pins.py > docker/constraints.txt

What CUDA builds of torch bring along (nvidia-…, triton) torch itself names by exact version.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
EXTRAS = ("ray",)  # that images are built with
_HEADER = "# The versions that the tests ran with. Made by docker/pins.py; setuptools builds the wheel.\n"


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Versions by name of what these requirements and theirs come to here.

    Raises:
        PackageNotFoundError: one of the first is not installed.
    """
    waiting = [(Requirement(text), frozenset[str](), True) for text in requirements]
    pins: dict[str, str] = {}
    seen = set()
    while waiting:
        requirement, extras, must_be = waiting.pop()
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if not wanted or key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(key[0])
        except PackageNotFoundError:
            if must_be:
                raise
            continue  # of a CUDA build of torch
        pins[key[0]] = Version(found.version).public
        waiting += [(Requirement(text), key[1], False) for text in found.requires or ()]
    return pins


def main() -> None:
    """Print the file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    pins = closure([*project["dependencies"], *extras, "setuptools"])
    print(_HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))


if __name__ == "__main__":
    main()
