"""Where in a prompt its question stands, which chooses what working memory calls back."""

from __future__ import annotations

from collections.abc import Callable

_MOST = 1000  # characters
_LEAST = 8


def question_of(text: str, rendered: str, encode: Callable[[str], list[int]]) -> tuple[int, int] | None:
    """(its tokens, tokens behind it) of what a message says last: its last paragraph, or the end of that.

    Args:
        text: the prompt's last message. rendered: the prompt.
        encode: ids of a text that stands behind others.

    Returns:
        None where the template does not show the message as it is.
    """
    tail = text.rstrip()[-_MOST:]
    place = rendered.rfind(tail) if tail else -1
    if place < 0:
        return None
    behind = rendered[place + len(tail) :]
    return len(encode(_last_paragraph(tail))), len(encode(behind)) if behind else 0


def _last_paragraph(text: str) -> str:
    found = text[text.rfind("\n\n") + 2 :] if "\n\n" in text else text
    return found if len(found) >= _LEAST else text
