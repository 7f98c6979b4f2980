"""Prints what pyproject.toml asks for, one requirement a line, so that an image's layer of dependencies does not change
when the code does.

    python3 docker/requirements.py [EXTRA ...] < pyproject.toml
"""

import sys
import tomllib


def main() -> None:
    project = tomllib.loads(sys.stdin.read())["project"]
    extras = project["optional-dependencies"]
    if unknown := set(sys.argv[1:]) - set(extras):
        sys.exit(f"pyproject.toml has no extra {', '.join(sorted(unknown))}; it has {', '.join(sorted(extras))}")
    for requirement in (*project["dependencies"], *(line for extra in sys.argv[1:] for line in extras[extra])):
        print(requirement)


main()
