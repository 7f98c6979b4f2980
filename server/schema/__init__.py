"""Request bodies, checked strictly: an unknown field is an error, never dropped. One HTTP noun a file."""

from .base import SESSION_ID
from .chat import ChatCompletionRequest, parse_chat

__all__ = ["SESSION_ID", "ChatCompletionRequest", "parse_chat"]
