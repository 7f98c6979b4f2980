"""PaceLLM: long-context inference with working memory (Persistent Activity, arXiv 2506.17310)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pacellm.config import EngineConfig, PAConfig

if TYPE_CHECKING:
    from pacellm.llm import LLM
    from pacellm.memory.bank import Bank
    from pacellm.types import SamplingParams

__all__ = ["LLM", "Bank", "EngineConfig", "PAConfig", "SamplingParams", "__version__"]
__version__ = "0.1.0"
_PLACES = {"LLM": "pacellm.llm", "Bank": "pacellm.memory.bank", "SamplingParams": "pacellm.types"}


def __getattr__(name: str) -> Any:
    """What needs torch is loaded when it is asked for: the command line starts without it."""
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
