"""PaceLLM: long-context inference with working memory (Persistent Activity, arXiv 2506.17310)."""

from pacellm.config import EngineConfig, PAConfig
from pacellm.memory.bank import Bank

__all__ = ["Bank", "EngineConfig", "PAConfig", "__version__"]
__version__ = "0.1.0"
