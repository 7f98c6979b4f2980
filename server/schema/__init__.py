"""Request bodies, checked strictly: an unknown field is an error, never dropped. One HTTP noun a file."""

from server.schema.base import SESSION_ID
from server.schema.chat import ChatCompletionRequest, parse_chat

__all__ = ["SESSION_ID", "ChatCompletionRequest", "parse_chat"]
