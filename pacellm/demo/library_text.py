"""Long prose that every machine with Python has: the language's reference, and what its library says of itself."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

_LEAST = 200  # characters of a docstring that says something


def library_text() -> Iterator[str]:
    """Paragraphs: the topics of Python's reference, then docstrings of its library, 1.2 million characters in all."""
    for topic in sorted(topics):
        yield from _paragraphs(topics[topic])
    for name in sorted(sys.stdlib_module_names):
        for told in _docstrings(name):
            yield from _paragraphs(told)


def _paragraphs(told: str) -> Iterator[str]:
    return (part.strip() for part in told.split("\n\n") if part.strip())


def _docstrings(name: str) -> Iterator[str]:
    """Those of a module and of all in it, from its source; nothing is imported."""
    spec = importlib.util.find_spec(name)
    source = None if spec is None or spec.origin is None else Path(spec.origin)
    if source is None or source.suffix != ".py" or not source.exists():
        return
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            told = ast.get_docstring(node) or ""
            if len(told) >= _LEAST:
                yield told
