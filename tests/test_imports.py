"""Imports run one way: errors, config, modes, types, rows, transfer, kernels <- memory, experts, calibration <- model
<- engine <- server; only ``pacellm/model`` and ``pacellm/tokenizer.py`` import transformers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {
    "pacellm.errors": 0,
    "pacellm.config": 0,
    "pacellm.types": 0,
    "pacellm.modes": 0,
    "pacellm.rows": 0,
    "pacellm.transfer": 0,
    "pacellm.kernels": 0,
    "pacellm.pieces": 0,
    "pacellm.detokenizer": 0,
    "pacellm.literals": 0,
    "pacellm.grammar": 0,
    "pacellm.dialect": 0,
    "pacellm.gguf_header": 0,
    "pacellm.memory": 1,
    "pacellm.experts": 1,
    "pacellm.calibration": 1,
    "pacellm.model": 2,
    "pacellm.tokenizer": 2,
    "pacellm.real_models": 2,
    "pacellm.engine": 3,
    "server": 4,
}
# the command line puts everything together; the demo trains and shows its own model; the chat client speaks HTTP
FREE = (
    "pacellm/cli.py",
    "pacellm/layout_cli.py",
    "pacellm/calibrate_cli.py",
    "pacellm/chat.py",
    "pacellm/__init__.py",
    "pacellm/demo/",
)
FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("pacellm", "server") for path in (ROOT / top).rglob("*.py")
)


def imports(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(module):
    return max(
        (number for name, number in LEVELS.items() if module == name or module.startswith(f"{name}.")), default=None
    )


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith(FREE)])
def test_arrows(path):
    own = level(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert own is not None, f"{path} has no place in the order"
    for module in imports(path):
        other = level(module)
        assert other is None or other <= own, f"{path} imports {module}, which lies above it"
        if module.split(".")[0] == "transformers":
            assert path.startswith("pacellm/model/") or path == "pacellm/tokenizer.py", f"{path} imports transformers"
        if module.split(".")[0] in ("fastapi", "starlette", "uvicorn", "prometheus_client", "httpx", "opentelemetry"):
            assert own == 4, f"{path} knows HTTP"


@pytest.mark.parametrize("name", ["scheduler", "kv", "sequence", "text"])
def test_bookkeeping_needs_no_torch(name):
    assert not any(module.split(".")[0] == "torch" for module in imports(f"pacellm/engine/{name}.py"))
