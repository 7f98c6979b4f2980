"""A client that sees what a user sees of an answer: text, the moments of its tokens, what it says of its session."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

Message = dict[str, str]
_RETRY_SECONDS = 0.2


class Cut(Exception):
    """The connection ended before the answer did."""


class Refused(Exception):
    """The server answered with an error; ``body`` is what it said."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body


@dataclass
class Reply:
    """An answer as it came.

    Attributes:
        times: when each piece of text came, ``time.perf_counter`` seconds; ``sent``: when the request went out.
        pace: the answer's ``pacellm`` object. ``comments``: keep-alive comments before the end.
        refusals: how often the server was too busy before it took the request.
    """

    sent: float = 0.0
    text: str = ""
    times: list[float] = field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    pace: dict[str, Any] = field(default_factory=dict)
    comments: int = 0
    refusals: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first piece of text."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def open_client(url: str, key: str | None = None) -> httpx.AsyncClient:
    """A client without limits of its own."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=httpx.Timeout(None, connect=10))


def chat_body(messages: list[Message], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A streamed chat request at temperature 0."""
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **more}  # fmt: skip


async def ask(
    client: httpx.AsyncClient, messages: list[Message], session: str | None = None, *, max_tokens: int = 24, **more: Any
) -> Reply:
    """One streamed answer; waits and tries again where the server is too busy (429).

    Raises:
        Cut: the connection ended first. Refused: another error.
    """
    headers = {"X-Session-ID": session} if session is not None else {}
    reply = Reply()
    while True:
        reply.sent = time.perf_counter()
        try:
            async with client.stream(
                "POST", "/v1/chat/completions", json=chat_body(messages, max_tokens, **more), headers=headers
            ) as response:
                if response.status_code != 200:
                    body = await response.aread()
                    if response.status_code != 429:
                        raise Refused(response.status_code, body.decode(errors="replace"))
                else:
                    await _read(response, reply)
                    return reply
        except httpx.TransportError as error:
            raise Cut(repr(error)) from error
        reply.refusals += 1
        await asyncio.sleep(_RETRY_SECONDS)


async def _read(response: httpx.Response, reply: Reply) -> None:
    async for line in response.aiter_lines():
        if line.startswith(":"):
            reply.comments += 1
        elif line == "data: [DONE]":
            return
        elif line.startswith("data: "):
            _take(json.loads(line[6:]), reply)
    raise Cut("the stream ended without [DONE]")


def _take(chunk: dict[str, Any], reply: Reply) -> None:
    if "error" in chunk:
        raise Refused(200, chunk["error"])
    reply.pace = chunk.get("pacellm") or reply.pace
    reply.usage = chunk.get("usage") or reply.usage
    for choice in chunk["choices"]:
        if piece := choice["delta"].get("content"):
            reply.times.append(time.perf_counter())
            reply.text += piece
        reply.finish = choice["finish_reason"] or reply.finish
