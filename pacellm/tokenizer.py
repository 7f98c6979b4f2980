"""Chat template and tokenizer, through transformers. Slow on long prompts: call it off the event loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pacellm.errors import ContextLengthExceeded, ModelError, RequestError
from pacellm.pieces import PieceMemo


class ChatTokenizer:
    """Messages to ids.

    Args:
        path: directory or hub name of the checkpoint.

    Raises:
        ModelError: there is no fast tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the tokenizer of {path}: {error}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(f"{path} has no fast tokenizer")
        self._tokenizer = tokenizer
        self.backend = backend
        self._memo = PieceMemo(backend)
        self._longest = max((len(token) for token in backend.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        """Chat requests can be rendered."""
        return bool(self._tokenizer.chat_template)

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation.

        Args:
            messages: dicts with ``role`` and ``content`` (a string).

        Raises:
            RequestError: the model's template refuses the messages, or there is none.
        """
        if not self.has_chat_template:
            raise RequestError("this model has no chat template", param="messages")
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}", param="messages") from error
        assert isinstance(rendered, str)
        return rendered

    def encode(self, text: str, *, limit: int | None = None, scope: str | None = None) -> list[int]:
        """Ids of a rendered prompt. The interpreter is not held meanwhile.

        Args:
            text: may contain special tokens; none are added.
            limit: refuse before tokenising what cannot have so few tokens.
            scope: whose texts these are, as a session's name; long pieces are remembered within it.

        Raises:
            ContextLengthExceeded: the text has more than ``limit`` tokens for certain.
        """
        at_least = len(text) // self._longest
        if limit is not None and at_least > limit:
            raise ContextLengthExceeded(
                f"the prompt has at least {at_least:,} tokens; this model's context is {limit:,} tokens",
                param="messages",
            )
        return self._memo.encode(text, scope)

    def forget(self, scope: str, *, below: bool = False) -> None:
        """Drop the pieces remembered for a scope; with ``below`` for every scope whose name begins so."""
        self._memo.forget(scope, below=below)

    def token_text(self, token: int) -> str:
        """A token as text; a part of a character comes out as U+FFFD."""
        return self.backend.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> list[int]:
        """The bytes of :meth:`token_text`."""
        return list(self.token_text(token).encode())
