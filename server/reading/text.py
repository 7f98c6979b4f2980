"""Texts to ids. Slow on long ones: called off the event loop."""

from __future__ import annotations

from typing import get_args

from pacellm.errors import RequestError
from pacellm.text.tokenizer import COUNTED_TOKENS, ChatTokenizer
from pacellm.types import Append, End


def text_prompt(
    tokenizer: ChatTokenizer, prompt: str | list[int], limit: int | None, *, is_cut: bool, add_special_tokens: bool
) -> list[int]:
    """Ids of a completion's prompt; ids stay as they are.

    Args:
        limit, is_cut: as for :func:`text_limit`.

    Raises:
        RequestError: no text, or too long for certain.
    """
    if isinstance(prompt, list):
        return prompt
    check_text(prompt, "prompt")
    return tokenizer.encode(prompt, limit=text_limit(limit, is_cut=is_cut), add_special_tokens=add_special_tokens)


def text_append(
    tokenizer: ChatTokenizer, prompt: str | list[int], whole: list[int], limit: int | None = None
) -> Append:
    """A completion's prompt as it follows a session's history, right behind its last token.

    Args:
        whole: ids of the prompt alone.
        limit: the model's context.
    """
    ids = prompt if isinstance(prompt, list) else tokenizer.encode_behind(prompt, limit=limit)
    return Append(dict.fromkeys(get_args(End), ids), whole, param="prompt")


def text_limit(limit: int | None, *, is_cut: bool = True) -> int | None:
    """Tokens that a text may have.

    Args:
        limit: the model's context.
        is_cut: only a part of it is used in the end, or nothing but its count.
    """
    return max(limit, COUNTED_TOKENS) if is_cut and limit is not None else limit


def check_text(text: str, param: str) -> None:
    """Refuse what is not Unicode text.

    Raises:
        RequestError: unpaired surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("text has unpaired surrogates", param=param) from None
