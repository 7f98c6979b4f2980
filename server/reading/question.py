"""Where in a prompt its question stands, which chooses what working memory calls back."""

from __future__ import annotations

from collections.abc import Sequence

from pacellm.text.tokenizer import ChatTokenizer

from .messages import Message

_MOST = 1000  # characters
_LEAST = 8


def question_of(tokenizer: ChatTokenizer, messages: Sequence[Message], rendered: str) -> tuple[int, int] | None:
    """(its tokens, tokens behind it) of what the last message says last: its last paragraph, or the end of that.

    Args:
        rendered: the prompt, whose texts are shielded.

    Returns:
        None where the template does not show the message as it is.
    """
    text = tokenizer.literals.shielded(messages[-1].text()).rstrip()
    place = rendered.rfind(text[-_MOST:]) if text else -1
    if place < 0:
        return None
    asked = _last_paragraph(text[-_MOST:])
    behind = rendered[place + len(text[-_MOST:]) :]
    count = len(tokenizer.encode_behind(asked, is_chat=True))
    return (count, len(tokenizer.encode_behind(behind, is_chat=True)) if behind else 0) if count else None


def _last_paragraph(text: str) -> str:
    found = text[text.rfind("\n\n") + 2 :] if "\n\n" in text else text
    return found if len(found) >= _LEAST else text
