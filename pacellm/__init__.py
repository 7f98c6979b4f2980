"""PaceLLM: long-context inference with working memory (Persistent Activity, arXiv 2506.17310)."""

from __future__ import annotations

TYPE_CHECKING = False  # as of typing, whose import takes longer than all else that the command line begins with
if TYPE_CHECKING:
    from typing import Any

    from pacellm.config import EngineConfig, PAConfig
    from pacellm.llm import LLM
    from pacellm.memory.bank import Bank
    from pacellm.types import SamplingParams

__all__ = ["LLM", "Bank", "EngineConfig", "PAConfig", "SamplingParams", "__version__"]
__version__ = "0.1.0"
_PLACES = {
    "LLM": "pacellm.llm",
    "Bank": "pacellm.memory.bank",
    "EngineConfig": "pacellm.config",
    "PAConfig": "pacellm.config",
    "SamplingParams": "pacellm.types",
}


def __getattr__(name: str) -> Any:
    """What takes long to import is loaded when it is asked for: the command line starts without it."""
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
