"""Prints the versions, in this environment, of everything that the server needs: docker/constraints.txt.

    .venv/bin/python docker/pins.py > docker/constraints.txt

What CUDA builds of torch bring along (nvidia-…, triton) torch itself names by exact version.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

_HEADER = "# The versions that the tests ran with. Made by docker/pins.py; setuptools builds the wheel.\n"


def closure(name: str, extras: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Names and versions of a distribution's requirements, theirs included; with those of its ``extras``."""
    waiting, seen = [(name, frozenset(extras))], set()
    while waiting:
        name, extras = waiting.pop()
        for text in distribution(name).requires or ():
            requirement = Requirement(text)
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")
            )
            key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if not wanted or key in seen:
                continue
            seen.add(key)
            try:
                version = Version(distribution(key[0]).version)
            except PackageNotFoundError:
                continue  # of a CUDA build
            yield key[0], version.public
            waiting.append(key)


def main() -> None:
    pins = dict(closure("pacellm")) | {"setuptools": distribution("setuptools").version}
    print(_HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))


if __name__ == "__main__":
    main()
