"""Conversations to the text of a prompt. Slow on long ones: called off the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pacellm.text.tokenizer import ChatTokenizer

from .chat_input import ChatInput
from .messages import Message
from .template_input import TemplateInput
from .text import check_text
from .tools import Tool


def rendered_input(tokenizer: ChatTokenizer, asked: ChatInput) -> str:
    """What is asked as :meth:`ChatTokenizer.encode_chat` takes it.

    Raises:
        RequestError: the template refuses it.
    """
    return rendered_chat(
        tokenizer,
        asked.messages,
        asked.tools,
        add_generation_prompt=asked.adds_prompt,
        continue_final_message=asked.continues,
        variables=asked.variables,
    )


def rendered_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    *,
    variables: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """A conversation as :meth:`ChatTokenizer.encode_chat` takes it.

    Args:
        variables, options: of :meth:`ChatTokenizer.render`.

    Raises:
        RequestError: the template refuses it.
    """
    for number, message in enumerate(messages):
        check_text(message.text(), f"messages.{number}.content")
    template = TemplateInput(tokenizer, messages, tools, is_open=bool(options.get("continue_final_message")))
    variables = tokenizer.literals.shielded_value(dict(variables or {}))
    rendered = tokenizer.render(template.messages(), tools=template.tools(), variables=variables, **options)
    rendered = template.restored(rendered)
    check_text(rendered, "messages")
    return rendered


def check_characters(tokenizer: ChatTokenizer, messages: Sequence[Message], limit: int | None) -> None:
    """Refuse a conversation that is too long for certain before it is rendered.

    Args:
        limit: tokens.

    Raises:
        ContextLengthExceeded: it is.
    """
    tokenizer.check_length(sum(message.num_characters() for message in messages), limit)
