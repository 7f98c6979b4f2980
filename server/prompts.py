"""Bodies to prompt ids. Slow on long prompts: called off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pacellm.errors import RequestError
from pacellm.tokenizer import ChatTokenizer
from pacellm.types import Append, End
from server.conversation import for_template
from server.schema.completions import CompletionRequest
from server.schema.messages import Message
from server.schema.tools import Tool
from server.schema.turn import TurnRequest


def chat_prompt(
    tokenizer: ChatTokenizer, asked: TurnRequest, limit: int | None, scope: str | None = None
) -> tuple[str, list[int]]:
    """A conversation's prompt, as text and ids.

    Args:
        limit: the model's context; a prompt that is longer for certain is refused before tokenising.
        scope: whose texts these are, as tenant and session; long pieces are remembered within it.

    Raises:
        RequestError: the template refuses it, or it is too long.
    """
    rendered = rendered_chat(
        tokenizer,
        asked.messages,
        asked.tools,
        add_generation_prompt=asked.adds_prompt,
        continue_final_message=asked.continues,
        variables=asked.variables,
    )
    return rendered, tokenizer.encode(rendered, limit=None if asked.is_truncated else limit, scope=scope)


def rendered_chat(
    tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Tool], **options: Any
) -> str:  # fmt: skip
    """A conversation as the model gets it.

    Args:
        options: of :meth:`ChatTokenizer.render`.

    Raises:
        RequestError: the template refuses it.
    """
    dialect = tokenizer.dialect
    shown = [tool.shown() for tool in tools] if dialect.reads_tools and tools else None
    for number, message in enumerate(messages):
        check_text(message.text(), f"messages.{number}.content")
    rendered = tokenizer.render(for_template(messages, tools, dialect), tools=shown, **options)
    check_text(rendered, "messages")
    return rendered


def text_prompt(
    tokenizer: ChatTokenizer, prompt: str | list[int], body: CompletionRequest, limit: int | None
) -> list[int]:
    """Ids of a completion's prompt; ids stay as they are.

    Raises:
        RequestError: no text, or too long for certain.
    """
    if isinstance(prompt, list):
        return prompt
    check_text(prompt, "prompt")
    limit = None if body.truncate_prompt_tokens is not None else limit
    return tokenizer.encode(prompt, limit=limit, add_special_tokens=body.add_special_tokens)


def text_append(tokenizer: ChatTokenizer, prompt: str | list[int], whole: list[int]) -> Append:
    """A completion's prompt as it follows a session's history, right behind its last token.

    Args:
        whole: ids of the prompt alone.
    """
    ids = prompt if isinstance(prompt, list) else tokenizer.encode_behind(prompt)
    return Append(dict.fromkeys(get_args(End), ids), whole, param="prompt")


def check_text(text: str, param: str) -> None:
    """Refuse what is not Unicode text.

    Raises:
        RequestError: unpaired surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("text has unpaired surrogates", param=param) from None
