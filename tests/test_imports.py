"""Imports run one way: no module is in a circle, and packages are stacked as ``PLACES`` says, lowest first."""

import ast
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
# a module's place is that of its longest name here; it may import what lies lower, and its own package
PLACES = (
    ("errors", "view", "config", "types", "modes", "rows", "transfer", "kernels", "faults"),
    ("text.dialect", "text.constraints", "completion"),
    ("text",),
    ("memory",),
    ("calibration.file", "calibration.gate", "calibration.draw", "experts.layout", "experts.cluster", "experts.draw"),
    ("model", "experts", "gguf", "text.tokenizer", "real_models"),
    # what all layers above pass around
    ("kv.history", "kv.blocks", "sessions.turn", "sessions.session", "sessions.ending"),
    ("engine.sequence", "engine.step"),
    ("kv", "recall"),
    ("sessions",),
    ("run",),
    ("engine",),
    ("calibration", "experts.activity"),
    ("server",),
    ("llm", "demo"),
    ("cli", "__main__"),
)  # fmt: skip
LEVELS = {f"pacellm.{name}": level for level, names in enumerate(PLACES) for name in names}
MODULES = {
    path.relative_to(ROOT).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for top in ("pacellm", "pacellm/server")
    for path in (ROOT / top).rglob("*.py")
}
TRANSFORMERS = (
    "pacellm.model",
    "pacellm.gguf",
    "pacellm.demo",
    "pacellm.text.tokenizer",
    "pacellm.text.response_parser",
)
HTTP = ("fastapi", "starlette", "uvicorn", "prometheus_client", "httpx", "opentelemetry")


@cache
def imports(module):
    """What a module imports, as (module or package, is it a module of ours)."""
    path = MODULES[module]
    own = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = own[: len(own) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= (named & MODULES.keys()) | ({base} if named - MODULES.keys() else set())
    return found


def place(module):
    parts = module.split(".")
    if len(parts) == 1:
        return len(PLACES)  # the front door
    return next(LEVELS[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in LEVELS)


def circles():
    """Strongly connected modules (Tarjan), of two and more."""
    number, low, stack, found = {}, {}, [], []

    def visit(module):
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in imports(module) & MODULES.keys():
            if other not in number:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            circle = [stack.pop()]
            while circle[-1] != module:
                circle.append(stack.pop())
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in MODULES:
        if module not in number:
            visit(module)
    return found


def test_no_circles():
    assert sys.getrecursionlimit() > 500
    assert circles() == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows(module):
    own = place(module)
    for other in imports(module):
        if other in MODULES:
            is_near = module.rsplit(".", 1)[0] == other.rsplit(".", 1)[0]
            assert other == "pacellm" or is_near or place(other) <= own, (
                f"{module} imports {other}, which lies above it"
            )
        top = other.split(".")[0]
        if top == "transformers":
            assert module.startswith(TRANSFORMERS), f"{module} imports transformers"
        if top in HTTP:
            assert module.startswith(("pacellm.server", "pacellm.demo", "pacellm.cli")), f"{module} knows HTTP"


@pytest.mark.parametrize("name", ["engine.scheduler", "engine.sequence", "kv.blocks", "text.stream"])
def test_bookkeeping_needs_no_torch(name):
    assert not any(module.split(".")[0] == "torch" for module in imports(f"pacellm.{name}"))


def test_the_server_has_one_name():
    """In a checkout ``server`` could be imported by that name too, and would be there twice."""
    for path in [
        *(ROOT / "server").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "load_tests").rglob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "server" for name in names), f"{path}: import pacellm.server"


def test_the_wheel_has_one_top_level_name():
    packages = setuptools.find_packages(str(ROOT), **tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
                                        ["setuptools"]["packages"]["find"])  # fmt: skip
    assert {package.split(".")[0] for package in packages} == {"pacellm"}
    assert {f"pacellm.server.{name}" for name in ("api.chat", "reading", "writing")} <= set(packages)
