"""Bodies to prompt ids. Slow on long prompts: called off the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pacellm.errors import RequestError
from pacellm.text.tokenizer import COUNTED_TOKENS, ChatTokenizer
from pacellm.types import Append, End

from .conversation import Talk
from .schema.completions import CompletionRequest
from .schema.messages import Message
from .schema.tools import Tool
from .schema.turn import TurnRequest


def rendered_turn(tokenizer: ChatTokenizer, asked: TurnRequest) -> str:
    """A turn as :meth:`ChatTokenizer.encode_chat` takes it.

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
    talk = Talk(tokenizer, messages, tools, is_open=bool(options.get("continue_final_message")))
    variables = tokenizer.literals.shielded_value(dict(variables or {}))
    rendered = tokenizer.render(talk.messages(), tools=talk.tools(), variables=variables, **options)
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
    limit = text_limit(limit, is_cut=body.truncate_prompt_tokens is not None)
    return tokenizer.encode(prompt, limit=limit, add_special_tokens=body.add_special_tokens)


def text_limit(limit: int | None, *, is_cut: bool = True) -> int | None:
    """Tokens that a text may have.

    Args:
        limit: the model's context.
        is_cut: only a part of it is used in the end, or nothing but its count.
    """
    return max(limit, COUNTED_TOKENS) if is_cut and limit is not None else limit


def check_characters(tokenizer: ChatTokenizer, messages: Sequence[Message], limit: int | None) -> None:
    """Refuse a conversation that is too long for certain before it is rendered.

    Args:
        limit: tokens.

    Raises:
        ContextLengthExceeded: it is.
    """
    tokenizer.check_length(sum(message.num_characters() for message in messages), limit)


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


def check_text(text: str, param: str) -> None:
    """Refuse what is not Unicode text.

    Raises:
        RequestError: unpaired surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("text has unpaired surrogates", param=param) from None
