"""How much a model is to think, and to say: for chat templates that can be told."""

from __future__ import annotations

import dataclasses

from pacellm.errors import UnsupportedParameter
from pacellm.text.tokenizer import ChatTokenizer

from .chat_input import ChatInput, Effort

_SWITCHES = ("enable_thinking", "thinking")  # what templates call it


def told(tokenizer: ChatTokenizer, asked: ChatInput) -> ChatInput:
    """What is asked, its effort and verbosity as variables of the template, where it reads such. Variables that the
    client set itself stay.

    Raises:
        UnsupportedParameter: no reasoning is asked of a model that always reasons.
    """
    found: dict[str, bool | int | str] = {}
    if asked.verbosity is not None and "verbosity" in tokenizer.template_variables:
        found["verbosity"] = asked.verbosity
    if asked.effort is not None:
        found |= _effort(tokenizer, asked.effort)
    return dataclasses.replace(asked, variables={**found, **(asked.variables or {})}) if found else asked


def _effort(tokenizer: ChatTokenizer, effort: Effort) -> dict[str, bool | int | str]:
    known = tokenizer.template_variables
    found: dict[str, bool | int | str] = {name: effort != "none" for name in _SWITCHES if name in known}
    if "reasoning_effort" in known:
        found["reasoning_effort"] = effort
    if not found and effort == "none" and tokenizer.dialect.think is not None:
        raise UnsupportedParameter("this model's reasoning cannot be turned off", param="reasoning_effort")
    return found
