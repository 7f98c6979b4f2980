"""Fields of chat completions and responses that ask for nothing a client could miss where nothing is done."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..reading.messages import TextPart
from ..schema import Strict

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
_Name = Annotated[str, Field(max_length=512)]


class CacheOptions(Strict):
    """Prefixes are cached without being told to; a cache that only takes what is marked there is not."""

    mode: Literal["implicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None


class Prediction(Strict):
    """A text that the answer is thought to be much like. It would save time at most, and never changes the answer."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Field(max_length=4096, fail_fast=True)]


class HintFields(Strict):
    """Whose request it is, and how it may be served."""

    metadata: Metadata | None = None
    safety_identifier: _Name | None = None
    # there is one tier, which answers name
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    prompt_cache_key: _Name | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: CacheOptions | None = None
