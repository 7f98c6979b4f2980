"""A conversation and what its next message may be, whichever endpoint it came by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pacellm.text.constraints import Grammar

from .messages import Message
from .tools import NamedTool, Tool

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]
Choice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class ChatInput:
    """A conversation and what its next message may be.

    Attributes:
        messages: at least one.
        tools: that may be called.
        choice: what is to be done with them; "none" where there are none.
        only_one, several: at most one call, or more than one, was asked for.
        format: what the answer must look like where it is no call; None where it is free.
        n: choices.
        continues: the last message is to be gone on with, not answered.
        adds_prompt: the template begins the answer.
        variables: for the template.
        is_truncated: the prompt is cut to a length later, so it may be too long here.
        skip_special_tokens: special tokens are left out of the text.
        appends: the messages go on from a session's history.
        effort, verbosity: how much the model is to think, and to say.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    choice: Choice = "none"
    only_one: bool = False
    several: bool = False
    format: Grammar | None = None
    n: int = 1
    continues: bool = False
    adds_prompt: bool = True
    variables: Mapping[str, bool | int | str] | None = None
    is_truncated: bool = False
    skip_special_tokens: bool = True
    appends: bool = False
    effort: Effort | None = None
    verbosity: Verbosity | None = None
