"""Bodies to prompt ids. Slow on long prompts: called off the event loop."""

from __future__ import annotations

from typing import Any

from pacellm.errors import RequestError
from pacellm.tokenizer import ChatTokenizer
from server.schema.chat import ChatCompletionRequest
from server.schema.completions import CompletionRequest


def chat_prompt(
    tokenizer: ChatTokenizer, body: ChatCompletionRequest, limit: int | None, scope: str | None = None
) -> list[int]:
    """Ids of a conversation.

    Args:
        limit: the model's context; a prompt that is longer for certain is refused before tokenising.
        scope: whose texts these are, as tenant and session; long pieces are remembered within it.

    Raises:
        RequestError: the template refuses it, or it is too long.
    """
    messages: list[dict[str, Any]] = [{"role": message.role, "content": message.text()} for message in body.messages]
    for number, message in enumerate(messages):
        check_text(message["content"], f"messages.{number}.content")
    rendered = tokenizer.render(
        messages,
        add_generation_prompt=not body.continue_final_message and body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )
    return tokenizer.encode(rendered, limit=None if body.truncate_prompt_tokens is not None else limit, scope=scope)


def messages_prompt(
    tokenizer: ChatTokenizer, messages: list[dict[str, Any]], limit: int | None, scope: str | None
) -> list[int]:
    """Ids of a conversation that the model is to answer.

    Args:
        limit, scope: as for :func:`chat_prompt`.

    Raises:
        RequestError: the template refuses it, or it is too long.
    """
    for message in messages:
        check_text(message["content"], "messages")
    return tokenizer.encode(tokenizer.render(messages), limit=limit, scope=scope)


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


def check_text(text: str, param: str) -> None:
    """Refuse what is not Unicode text.

    Raises:
        RequestError: unpaired surrogates.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError("text has unpaired surrogates", param=param)
