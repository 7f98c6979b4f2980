"""PaceLLM: long-context inference with working memory (Persistent Activity, arXiv 2506.17310)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pacellm.config import EngineConfig, PAConfig

if TYPE_CHECKING:
    from pacellm.memory.bank import Bank

__all__ = ["Bank", "EngineConfig", "PAConfig", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Classes that need torch are loaded when they are asked for: the command line starts without it."""
    if name == "Bank":
        from pacellm.memory.bank import Bank

        return Bank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
